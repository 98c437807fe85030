"""Taking a trained adapter out of a run, in PEFT's format."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from lowmem_grpo.checksum import read_sealed
from lowmem_grpo.errors import ConfigError, DamageError, ExportError, StorageError
from lowmem_grpo.policy.adapter_files import CONFIG, WEIGHTS
from lowmem_grpo.policy.source import read_object
from lowmem_grpo.run.best import BEST, FILE, read_best
from lowmem_grpo.run.checkpoint import SEALS, newest_sound, read_state
from lowmem_grpo.run.directory import PARTIAL, replace_directory, sync_file

__all__ = [
    "adapter_directory", "check_output", "export_adapter", "exported_step", "exported_to", "run_of",
]  # fmt: skip

_AGAIN = "--resume writes it again"


def adapter_directory(
    run_path: Path, best: bool = False, warn: Callable[[str], None] = lambda text: None
) -> Path:
    """Where a run's adapter is: the final one, or the newest sound checkpoint's where a run goes on
    or has not ended; or the `best`. `warn`: see `newest_sound`. Raises ConfigError for none,
    DamageError for one that is damaged.
    """
    if not (run_path / "config.toml").is_file():
        raise ConfigError(f"{run_path} is not a run directory (it has no config.toml)")
    if best:
        if not (run_path / BEST / FILE).is_file():
            raise ConfigError(f"{run_path} has no best adapter: train with --metric-for-best")
        read_best(run_path / BEST)
        return run_path / BEST
    final = run_path / "adapter"
    reached = read_sealed(final / SEALS, _AGAIN)["step"] if final.is_dir() else -1
    try:
        checkpoint = newest_sound(run_path, warn)
    except DamageError as error:
        if reached < 0:
            raise
        warn(f"{error}; the final adapter is sound")
        checkpoint = None
    if checkpoint is not None and read_state(checkpoint)["step"] > reached:
        return checkpoint
    if reached < 0:
        raise ConfigError(f"{run_path} has no adapter yet: no checkpoint was written")
    return final


def run_of(adapter: Path) -> Path | None:
    """The run whose directory an adapter lies in: as its final one, its best, or a checkpoint's.
    None for one that lies elsewhere. Raises DamageError where it is not what was written.
    """
    adapter = adapter.resolve()
    kept = adapter.parent.name == "checkpoints"
    folder = adapter.parent.parent if kept else adapter.parent
    own = kept or adapter.name in ("adapter", BEST)
    if not own or not (folder / "config.toml").is_file():
        return None
    exported_step(adapter)
    return folder


def exported_step(adapter: Path) -> int:
    """The step after which the adapter of `adapter_directory` was saved. Of a run that was killed
    there may be lines of later steps than its newest checkpoint.
    """
    if (adapter / FILE).is_file():
        return read_best(adapter)["step"]
    if (adapter / SEALS).is_file():
        return read_sealed(adapter / SEALS, _AGAIN)["step"]
    return read_state(adapter)["step"]


def check_output(output: Path) -> None:
    """Raises ConfigError unless there is nothing at `output`, or an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty directory")


@contextlib.contextmanager
def exported_to(output: Path) -> Iterator[Path]:
    """A directory to write to, which comes to be at `output` when it is complete, and not before.
    Raises ConfigError as `check_output` does, StorageError for what cannot be written, ExportError
    where the block finds that it is not the policy.
    """
    check_output(output)
    output = output.absolute()
    partial = output.with_name(f".{output.name}{PARTIAL}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir()
        yield partial
        for path in partial.rglob("*"):
            if path.is_file():
                sync_file(path)
        replace_directory(partial, output)
    except ExportError as error:
        raise ExportError(f"not exported to {output}: {error}") from error
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def export_adapter(source: Path, output: Path, base: str, tokenizer) -> None:
    """Copy the adapter at `source` into a directory, where it names `base` as its base, and write
    the tokenizer that it was trained with.
    """
    shutil.copyfile(source / WEIGHTS, output / WEIGHTS)
    settings = read_object(source / CONFIG)
    settings["base_model_name_or_path"] = base
    (output / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
    tokenizer.save_pretrained(output)

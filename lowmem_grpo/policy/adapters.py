"""LoRA adapters as they are asked for: on every layer that is named, and on none that is not.

PEFT drops what it does not find as long as it finds anything. Here each name, each alternative of a
pattern that is nearly a name, and each key of a pattern of ranks has to match; what is named and
left without an adapter all the same is said.

Left out: adapters on the output head, whose weight every role reads by tiles.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowmem_grpo.errors import ModelError, nearest
from lowmem_grpo.policy.lora import ADAPTER, lora_config
from lowmem_grpo.policy.norm import replace_norms
from lowmem_grpo.quiet import quiet_libraries

__all__ = [
    "ALL_LINEAR", "AdapterSettings", "adapts_embedding", "attach_adapters", "describe_adapters",
]  # fmt: skip

ALL_LINEAR = "all-linear"
ADAPTABLE = torch.nn.Linear, Conv1D, torch.nn.Embedding
CLOSE = 0.75  # of difflib's ratio, from which on a word of a pattern is taken for a misspelt name
# What in a pattern is no part of a name: what must not follow, escapes, classes, counts, groups.
_NOT_NAMES = re.compile(r"\(\?<?![^)]*\)|\\.|\[[^\]]*\]|\{[^}]*\}|\(\?P<\w+>|\(\?[aiLmsux=:<-]*")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """LoRA's rank, alpha, the layers it goes on ("all-linear", a list of names, or a pattern that
    whole names match), and A's initialisation.

    `target_parameters`: names of parameters that are no layer's weight, as of experts.
    `rank_pattern`, `alpha_pattern`: another rank or alpha for the layers that a key matches.
    `use_rslora`: alpha over the square root of the rank (arXiv 2312.03732).
    """

    r: int
    lora_alpha: float
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    init_lora_weights: bool | str = True
    target_parameters: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False


def attach_adapters(causal_lm, settings: AdapterSettings, seed: int):
    """Wrap a frozen 4-bit causal LM with LoRA adapters: float32, A drawn from `seed`, B zero. Its
    norms are replaced by ours. Returns the PeftModel.

    Raises ModelError for a name that matches nothing, naming the nearest, and for adapters that
    would do nothing.
    """
    replace_norms(causal_lm.requires_grad_(False))
    targets = settings.target_modules
    plain = [(name, type(module)) for name, module in causal_lm.named_modules() if name]
    _check_parameters(causal_lm, settings.target_parameters)
    asked = f"lora.target_modules = {targets!r}"
    # PEFT draws from the global stream; it is put back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = get_peft_model(causal_lm, lora_config(**vars(settings)), adapter_name=ADAPTER)
        except (ValueError, re.error) as error:
            reason = _first_unmatched(targets, plain) or str(error).splitlines()[0]
            raise ModelError(f"{asked}: {reason}") from error
    if any("lora_" in name for name, _ in causal_lm.get_output_embeddings().named_parameters()):
        # The head is read by tiles of its weight, in every role: adapters on it would do nothing.
        raise ModelError(
            f"{asked}: adapters on the output head are not supported, which every role shares: "
            "leave it out"
        )
    if reason := _unmatched(model, settings, plain):
        raise ModelError(f"{asked}: {reason}")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, name):
            if not any(re.match(rf"(.*\.)?({key})$", path) for path in _adapted(model)):
                raise ModelError(f"lora.{name}: {key!r} matches no layer with an adapter")
    return model


def describe_adapters(model, settings: AdapterSettings) -> list[str]:
    """Which layers of a PeftModel have adapters, in a line; and in another which have none although
    the settings name them.
    """
    adapted, targets = _adapted(model), settings.target_modules
    kinds = Counter(_leaf(path, 2 if _leaf(path) == "weight" else 1) for path in adapted)
    lines = [
        f"adapters on {len(adapted)} layers: "
        + ", ".join(f"{kind} {count}" for kind, count in kinds.items())
    ]
    base = model.get_base_model()
    head = base.get_output_embeddings()
    left = [
        path
        for path, module in base.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
        and module is not head
        and "lora_" not in path
        and _plain(path) not in adapted
        and _names(targets, _plain(path))
    ]
    if left:
        lines.append(
            f"no adapter on {len(left)} layers that lora.target_modules = {targets!r} names, first "
            f"{left[0]}: PEFT takes their names for those of the experts"
        )
    if isinstance(targets, str) and targets != ALL_LINEAR and (dead := _dead(targets, adapted)):
        lines.append(f"lora.target_modules: no layer with an adapter has {', '.join(dead)} in it")
    return lines


def adapts_embedding(config, settings: AdapterSettings) -> bool:
    """Whether the embedding of a model with this configuration gets an adapter."""
    targets = settings.target_modules
    if targets == ALL_LINEAR:
        return False
    with torch.device("meta"), quiet_libraries():
        model = AutoModelForCausalLM.from_config(config)
    embedding = model.get_input_embeddings()
    return any(_names(targets, path) for path, m in model.named_modules() if m is embedding)


def _unmatched(model, settings: AdapterSettings, plain: list[tuple[str, type]]) -> str | None:
    """What of the targets has matched nothing, or None."""
    targets, adapted = settings.target_modules, _adapted(model)
    if not isinstance(targets, str):
        # Names that PEFT has taken for experts' are no longer in its own list.
        own = model.peft_config[ADAPTER].target_modules or ()
        return _first_unmatched([name for name in targets if name in own], plain, adapted)
    if targets == ALL_LINEAR:
        return None
    known = {part for path, _ in plain for part in path.split(".")}
    for word in _dead(targets, adapted):
        if found := difflib.get_close_matches(word, known, n=1, cutoff=CLOSE):
            return f"no module is called '{word}' (did you mean '{found[0]}'?)"
    return None


def _first_unmatched(
    targets, plain: list[tuple[str, type]], adapted: Iterable[str] | None = None
) -> str | None:
    """The first of the names that is no module's, or None; `adapted`: that has no adapter."""
    known = sorted({_leaf(path) for path, kind in plain if issubclass(kind, ADAPTABLE)})
    if isinstance(targets, str):
        if targets in known:
            return f"a text alone is a pattern for whole names: use ['{targets}']"
        return None
    paths = [path for path, _ in plain] if adapted is None else list(adapted)
    for name in targets:
        if not any(_ends(path, name) for path in paths):
            return f"no module is called '{name}'{nearest(name, known)}"
        kinds = [kind for path, kind in plain if _ends(path, name)]
        if kinds and not any(issubclass(kind, ADAPTABLE) for kind in kinds):
            return f"'{name}' is a {kinds[0].__name__}, which has no weight: name its layers"
    return None


def _check_parameters(causal_lm, names: Iterable[str]) -> None:
    """Raises ModelError unless each of the names is that of parameters in 16 bits."""
    plain = dict(causal_lm.named_parameters())
    for name in names:
        found = [path for path in plain if _ends(path, name)]
        if not found:
            known = {_leaf(path, 2) for path in plain} | {_leaf(path) for path in plain}
            raise ModelError(
                f"lora.target_parameters: no parameter is called '{name}'"
                f"{nearest(name, sorted(known))}"
            )
        whole = [path for path in found if not plain[path].is_floating_point()]
        if whole:
            raise ModelError(
                f"lora.target_parameters: {whole[0]} is in 4 bits: name its layer in "
                "lora.target_modules"
            )


def _adapted(model) -> list[str]:
    """The names of layers, and of parameters, that have an adapter; each once."""
    found = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            own = f".{module.parameter_name}" if isinstance(module, ParamWrapper) else ""
            found[_plain(path) + own] = None
    return list(found)


def _dead(pattern: str, adapted: list[str]) -> list[str]:
    """The words of a pattern that are in no name that it matched."""
    ignoring = "(?i" in pattern
    names = [name.lower() if ignoring else name for name in adapted]
    words = re.findall(r"[A-Za-z_]\w+", _NOT_NAMES.sub(" ", pattern))
    return [w for w in words if not any((w.lower() if ignoring else w) in name for name in names)]


def _names(targets: str | Iterable[str], path: str) -> bool:
    if targets == ALL_LINEAR:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(_ends(path, name) for name in targets)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _leaf(path: str, parts: int = 1) -> str:
    return ".".join(path.split(".")[-parts:])


def _plain(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "base_layer")

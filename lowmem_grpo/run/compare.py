"""Whether what was exported is the policy: read again as others read it, and compared.

Two things are asked. Is every tensor in the files, under the name that plain transformers expects,
with the policy's numbers? And does the plain model say the same of a fixed probe? The second cannot
be exact: a 16-bit weight keeps 8 to 11 bits, and the plain model adds in another order. How far
apart rounding brings the two is measured and not guessed: the weights of the plain model are moved
by as much as rounding has moved them, at random, and it is asked once more.

Shapes: T tokens of a text of the probe, V vocabulary; n is a tile of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_grpo.errors import ExportError
from lowmem_grpo.policy.load import load_in_4_bits
from lowmem_grpo.policy.plain import PlainTensors, own_tensors
from lowmem_grpo.policy.source import resolve
from lowmem_grpo.quiet import quiet_libraries

__all__ = [
    "Difference", "Probed", "check_adapter", "check_plain", "check_probed", "compare",
    "plain_logits", "probe_policy", "read_plain",
]  # fmt: skip

ROWS = 64  # whose float64 log-probs are held at once
TOKENS, STRIDE = 64, 7919  # ids of the probe: multiples of a prime, around the vocabulary
TEXTS = (
    "Explain why the sky is blue, and give a number: how many kilometres does light travel in a "
    "second?",
    "A farmer has 17 sheep. All but 9 run away. How many are left? Think, then answer.",
)
MOVED = 1 / 12
"""Share of the weights that are moved by one unit of their last place. Its square's mean is then
the variance of an error of rounding, which lies anywhere within half a unit on either side.
"""
MOVED_AT_ONCE = 1 << 24
FACTOR = 4.0
"""Times what moving the weights does to the log-probs. Rounding itself did 0.3 to 1.5 times that:
tiny models of 27 architectures in four pairs of dtypes, with two seeds.
"""
LEAST = 1e-5  # nat; a few units of the last place of a float32 log-prob


@dataclass(frozen=True)
class Difference:
    """Of an exported model from its policy over `tokens` positions: the mean KL(policy || exported)
    in nat, the share of positions at which both find the same token the likeliest, and the mean
    distance of the log-probs of the next token, in nat.
    """

    tokens: int
    kl: float
    agreement: float
    apart: float

    def line(self) -> str:
        return (
            f"over {self.tokens} tokens of a fixed probe its mean KL from the trained policy is "
            f"{self.kl:.2g} nat, and the likeliest token is the same in {self.agreement:.1%}"
        )


@dataclass(frozen=True)
class Probed:
    """What a policy said of the texts of a probe: of each the token ids, and the logits [T, V],
    float32 on the CPU. `dtype`: the policy's.
    """

    texts: list[list[int]]
    logits: list[torch.Tensor]
    dtype: torch.dtype


def probe_policy(policy, reference: bool = False) -> Probed:
    """Ask the policy, or its reference, about texts that are the same for every policy with this
    tokenizer. In the trainer's role: the sampler's may round elsewhere.
    """
    tokenizer, vocab = policy.tokenizer, policy.head_weight_VD.shape[0]
    encoded = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS]
    texts = [[STRIDE * i % vocab for i in range(1, TOKENS + 1)], *filter(None, encoded)]
    logits = []
    with policy.as_reference() if reference else policy.as_trainable(), torch.no_grad():
        for ids in texts:
            ids_T = torch.tensor(ids, device=policy.device)
            positions_T = torch.arange(len(ids), device=policy.device)
            hidden_TD = policy.hidden(ids_T, positions_T, policy.layout([(len(ids), ())]))
            tiles = [policy.logits(hidden_nD).cpu() for hidden_nD in hidden_TD.split(ROWS)]
            logits.append(torch.cat(tiles))
    return Probed(texts, logits, policy.dtype)


def check_plain(
    policy, directory: Path, dtype: torch.dtype, adapters: bool = True
) -> list[torch.Tensor]:
    """Read a merged model again and compare it with the policy; without `adapters`, with its base.
    Returns what the plain model says of the probe. Raises ExportError with the numbers where it is
    another model.
    """
    model, plain = read_plain(directory), PlainTensors(policy, dtype, adapters)
    own = own_tensors(model)
    odd = [name for name in plain if name not in own or not torch.equal(plain[name], own[name])]
    odd += sorted(set(own) - set(plain))
    if odd:
        raise ExportError(
            f"{len(odd)} of the {len(own)} tensors that plain transformers reads are not the "
            f"policy's, first {odd[0]}"
        )
    return check_probed(probe_policy(policy, reference=not adapters), model)


def check_adapter(
    directory: Path, name: str, device: torch.device, probed: Probed, state: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Read an exported adapter again, with plain PEFT on the base called `name` in NF4, and compare
    it with the policy that it is of: what that said, and its adapters by name. Returns what the
    model says of the probe. Raises ExportError with the numbers where it is another model.
    """
    try:
        model = _read_adapter(directory, name, device, probed.dtype)
    except torch.OutOfMemoryError:  # plain transformers takes more than the policy does
        model = _read_adapter(directory, name, torch.device("cpu"), probed.dtype)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = own.keys() ^ state.keys()
    odd |= {n for n in own.keys() & state.keys() if not torch.equal(own[n].cpu(), state[n])}
    if odd:
        raise ExportError(
            f"{len(odd)} of the {len(state)} tensors of the adapter are not what plain PEFT reads, "
            f"first {min(odd)}"
        )
    return check_probed(probed, model)


def _read_adapter(directory: Path, name: str, device: torch.device, dtype: torch.dtype):
    with quiet_libraries():
        config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=False)
        base = load_in_4_bits(AutoModelForCausalLM, name, config, str(device), dtype)
        model = PeftModel.from_pretrained(base, directory).eval()
    for layer in model.modules():
        # In eval mode bitsandbytes' kernel for CPUs rounds the scales of blocks to bfloat16.
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.train()
    return model


def read_plain(directory: Path):
    """The model in a directory, as plain transformers reads it, on the CPU. Raises ExportError
    unless the files have each of its tensors and no other.
    """
    with quiet_libraries():
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype="auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    found = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if found:
        numbers = [f"{len(names)} {kind} (first {names[0]})" for kind, names in found.items()]
        raise ExportError(f"plain transformers finds {', '.join(numbers).replace('_', ' ')}")
    return model.eval()


def check_probed(probed: Probed, model) -> list[torch.Tensor]:
    """Compare a plain model with what a policy said. Returns what the model says; its weights are
    others afterwards. Raises ExportError where it is further away than rounding brings it.
    """
    theirs = plain_logits(model, probed.texts)
    found = compare(probed, theirs)
    _move_by_rounding(model)
    limit = FACTOR * _apart(probed.texts, theirs, plain_logits(model, probed.texts))
    if not found.apart <= max(LEAST, limit):
        raise ExportError(
            f"on {found.tokens} tokens of a fixed probe its log-probs are {found.apart:.3g} nat "
            f"from the policy's in the mean, and rounding explains {max(LEAST, limit):.2g}; its "
            f"mean KL from the policy is {found.kl:.2g} nat, and the likeliest token is the same "
            f"in {found.agreement:.1%}"
        )
    return theirs


def compare(probed: Probed, theirs: list[torch.Tensor]) -> Difference:
    """What a policy said beside the logits [T, V] of another model of the same texts."""
    tokens, kl, same = 0, 0.0, 0
    for ours_TV, theirs_TV in zip(probed.logits, theirs, strict=True):
        for ours_nV, theirs_nV in zip(ours_TV.split(ROWS), theirs_TV.split(ROWS), strict=True):
            ours_nV = ours_nV.double().log_softmax(-1)
            theirs_nV = theirs_nV.double().log_softmax(-1)
            kl += (ours_nV.exp() * (ours_nV - theirs_nV)).sum().item()
            same += int((ours_nV.argmax(-1) == theirs_nV.argmax(-1)).sum())
        tokens += len(ours_TV)
    apart = _apart(probed.texts, probed.logits, theirs)
    return Difference(tokens=tokens, kl=kl / tokens, agreement=same / tokens, apart=apart)


@torch.no_grad()
def plain_logits(model, texts: Sequence[list[int]]) -> list[torch.Tensor]:
    """Logits [T, V] of each text by a plain model, float32 on the CPU."""
    device = next(model.parameters()).device
    found = []
    for ids in texts:
        ids_1T = torch.tensor([ids], device=device)
        found.append(model(input_ids=ids_1T, use_cache=False).logits[0].float().cpu())
    return found


@torch.no_grad()
def _move_by_rounding(model: torch.nn.Module) -> None:
    """Move the weights of a model as far as rounding moves them, at random, each time the same."""
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        generator = torch.Generator(parameter.device).manual_seed(0)
        eps = torch.finfo(parameter.dtype).eps
        for part in parameter.view(-1).split(MOVED_AT_ONCE):
            drawn = torch.rand(part.shape, generator=generator, device=part.device)
            steps = (drawn < MOVED / 2).to(part.dtype) - (drawn > 1 - MOVED / 2).to(part.dtype)
            part.addcmul_(part, steps, value=eps)


def _apart(texts: list[list[int]], ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The mean distance of the log-probs of each next token, in nat."""
    distances = []
    for ids, ours_TV, theirs_TV in zip(texts, ours, theirs, strict=True):
        next_T1 = torch.tensor(ids[1:], dtype=torch.int64)[:, None]
        one, other = (
            logits[:-1].double().log_softmax(-1).gather(1, next_T1)
            for logits in (ours_TV, theirs_TV)
        )
        distances.append((one - other).abs())
    return torch.cat(distances).mean().item()

"""Whether the base is still what was loaded: sums of its bytes, and what the reference says of a
fixed probe.

Everything that GRPO computes rests on the base: it is in the policy, and it is the reference.
Consumer cards have no error correction for their memory, and a kernel that writes where it must not
writes somewhere. The sums see any bit that changed; the probe sees what sums of weights cannot, an
adapter that is on where it should be off.

Left out: what the sampler keeps of the weights for itself on a CPU (shared_input.py).
"""

import hashlib
from collections.abc import Iterator

import torch

from lowmem_grpo.errors import UserError
from lowmem_grpo.policy.ends import HostEmbedding, RoundedHead

__all__ = ["Base", "IntegrityError", "named_tensors"]

WORD = 8  # bytes
PROBE_TOKENS, STRIDE = 64, 7919  # ids of the probe: multiples of a prime, around the vocabulary
APART = 0.02
"""Nat a token. Within a process a probe repeats to the bit on a CPU, and nearly so on a card."""


class IntegrityError(UserError):
    """The base, or the reference, is not what it was."""

    exit_code = 1


class Base:
    """The base of a policy as it was when this was made. `digest`: of all its weights; on one kind
    of device the same model has the same.
    """

    def __init__(self, policy):
        self._policy = policy
        self._sums = base_sums(policy)
        # Under the same names whichever layers have an adapter.
        sums = {name.replace(".base_layer.", "."): x for name, x in self._sums.items()}
        text = repr(sorted(sums.items()))
        self.digest = f"{policy.device.type}:{hashlib.sha256(text.encode()).hexdigest()}"
        self.expect_reference()

    def is_other_than(self, digest: str) -> bool:
        """Whether a base on the same kind of device had another digest."""
        device = digest.partition(":")[0]
        return device == self._policy.device.type and digest != self.digest

    def expect_reference(self) -> None:
        """What the reference says now is what it is to say from here on: it may move."""
        self._said = reference_probe(self._policy)

    def check(self) -> None:
        """Raises IntegrityError where a weight is not what it was, or the reference says something
        else.
        """
        self._policy.release()
        sums = base_sums(self._policy)
        if changed := [name for name, was in self._sums.items() if sums.get(name) != was]:
            raise IntegrityError(
                f"{len(changed)} of the base's {len(sums)} tensors are not what was loaded, first "
                f"{changed[0]}: an error of the card's memory, or a kernel that wrote there"
            )
        apart = (reference_probe(self._policy) - self._said).abs().mean().item()
        if not apart <= APART:
            raise IntegrityError(
                f"the reference is not what it was, by {apart:.3g} nat a token on a fixed probe"
            )


def base_sums(policy) -> dict[str, int]:
    """A sum of the bytes of each tensor of the base, in words of 8, by name. Any bit that changes
    changes it; words that change places do not.
    """
    own = set(policy.adapter_parameters())
    found: dict[str, int] = {}
    for name, tensor in named_tensors(policy.model):
        if name not in own and ".lora_reference_" not in name:
            found[name] = found.get(name, 0) + _sum(tensor)
    for name, module in policy.model.named_modules():
        if isinstance(module, HostEmbedding):  # under the name that it has on the card
            found[f"{name}.weight"] = _sum(module.table.weight)
    if isinstance(policy.head_weight_VD, RoundedHead):
        found |= {name: _sum(tensor) for name, tensor in policy.head_weight_VD.tensors()}
    return found


def reference_probe(policy) -> torch.Tensor:
    """The reference's log-probs of a fixed sequence of tokens, float32 on the CPU."""
    vocab = policy.head_weight_VD.shape[0]
    ids = [STRIDE * i % vocab for i in range(1, PROBE_TOKENS + 1)]
    ids_T = torch.tensor(ids, device=policy.device)
    positions_T = torch.arange(PROBE_TOKENS, device=policy.device)
    with policy.as_reference():
        hidden_TD = policy.hidden(ids_T, positions_T, policy.layout([(PROBE_TOKENS, ())]))
        return policy.score(hidden_TD[:-1], ids_T[1:])[0].float().cpu()


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name, with the tensors of 4-bit weights' quantisation state."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        yield name, tensor
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            for field, value in vars(state).items():
                if isinstance(value, torch.Tensor):
                    yield f"{name}.{field}", value
            state = getattr(state, "state2", None)


def _sum(tensor: torch.Tensor) -> int:
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % WORD:
        flat = flat.clone()  # words have to begin where words begin
    bytes_ = flat.view(torch.uint8)
    whole = bytes_.numel() // WORD * WORD
    words = int(bytes_[:whole].view(torch.int64).sum()) if whole else 0
    return words + int(bytes_[whole:].sum())

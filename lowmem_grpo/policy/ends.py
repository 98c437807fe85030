"""The two ends of the model: the input embedding on the host, the output head in few bits.

Both are tables of V x D numbers in the compute dtype, 1 GiB each for an 8B model, and at any time a
few rows or a tile of them are needed. The embedding can lie in host memory: rows are gathered there
and sent. The head can be held in 8 bits, a scale a row,

    s_v = max |w_v| / 127        w8_v = round(w_v / s_v)

and is widened tile by tile where it is multiplied. Every role uses the same head, so the reference,
the old policy and the policy still are one model; it is another one than with 16 bits, by the
rounding.

Left out: models whose two ends are one weight. On the card it is needed as the head, so nothing
would be gained on the host; in 8 bits it would be two tables.

Shapes: V vocabulary, D hidden size, v rows of a tile.
"""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from lowmem_grpo.errors import ModelError

ROUNDED_AT_ONCE = 8192  # rows

__all__ = ["HostTable", "RoundedHead", "embedding_to_host", "round_head", "tied"]


class HostTable:
    """Rows of a table in host memory. `weight`: [V, D], wherever it is."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach().to("cpu")

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """[..., D] on the device of `ids`, which are int64 [...]."""
        found = torch.nn.functional.embedding(ids.to("cpu"), self.weight)
        return found.to(ids.device)


class HostEmbedding(torch.nn.Module):
    """An embedding whose table lies on the host."""

    def __init__(self, table: HostTable):
        super().__init__()
        self.table = table

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table.rows(ids)


class RoundedHead:
    """A head [V, D] in 8 bits that can be asked for rows like a tensor: `head[start:stop]`,
    `head[ids]`. `dtype` and `shape` are those of its rows.
    """

    requires_grad = False

    def __init__(self, weight_VD: torch.Tensor):
        self.dtype, self.shape, self.device = weight_VD.dtype, weight_VD.shape, weight_VD.device
        self.numbers_VD = weight_VD.new_empty(weight_VD.shape, dtype=torch.int8)
        self.scales_V1 = weight_VD.new_empty((weight_VD.shape[0], 1))
        for start in range(0, self.shape[0], ROUNDED_AT_ONCE):
            tile = slice(start, start + ROUNDED_AT_ONCE)
            wide_vD = weight_VD[tile].float()
            scales_v1 = (wide_vD.abs().amax(1, keepdim=True) / 127).to(self.dtype)
            scales_v1.clamp_min_(torch.finfo(self.dtype).tiny)
            self.scales_V1[tile] = scales_v1
            self.numbers_VD[tile] = (wide_vD / scales_v1).round_().clamp_(-127, 127)

    def __getitem__(self, rows) -> torch.Tensor:
        return self.numbers_VD[rows] * self.scales_V1[rows]

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        """What it holds, by name."""
        return [("head.numbers", self.numbers_VD), ("head.scales", self.scales_V1)]


def tied(causal_lm) -> bool:
    """Whether embedding and head are one weight."""
    embedding = getattr(causal_lm.get_input_embeddings(), "weight", None)  # or on the host
    return embedding is causal_lm.get_output_embeddings().weight


def embedding_to_host(causal_lm, table: type = HostTable) -> None:
    """Move the input embedding of a frozen model to the host. Raises ModelError where it is tied,
    or has an adapter.

    `table`: what holds it there, made from the weight.
    """
    if tied(causal_lm):
        raise ModelError(
            "memory.embedding_on_host = true: this model's embedding is its head as well, which "
            "the card needs; use memory.embedding_on_host = false"
        )
    embedding = causal_lm.get_input_embeddings()
    if isinstance(embedding, BaseTunerLayer):
        raise ModelError(
            "memory.embedding_on_host = true: the embedding has an adapter, which is trained on "
            "the card: use memory.embedding_on_host = false, or leave the embedding out of "
            "lora.target_modules"
        )
    causal_lm.set_input_embeddings(HostEmbedding(table(embedding.weight)))


def round_head(causal_lm) -> RoundedHead:
    """The head of a frozen model in 8 bits; the 16-bit one is let go of. Raises ModelError where it
    is tied.
    """
    if tied(causal_lm):
        raise ModelError(
            "model.lm_head_bits = 8: this model's head is its embedding as well, which would stay "
            "in 16 bits beside it; use model.lm_head_bits = 16"
        )
    head = causal_lm.get_output_embeddings()
    rounded = RoundedHead(head.weight.detach())
    head.weight = None
    return rounded

"""The layers of the usual architectures while sampling: their arithmetic, and nothing around it.

A decoding step gives a layer a handful of rows, and then a call costs as much as its arithmetic.
A Llama layer of transformers comes down to 98 operations in 14 modules, here to 79 in 4 (counted by
torch's dispatcher, on a CPU), in the same order and with the same rounding, so that what is sampled
from is what is trained:

    x = x + O attend(rotate(Q n(x)), rotate(K n(x)), V n(x))
    x = x + D (act(G n'(x)) * U n'(x))                        n, n': RMSNorm

Queries and keys lie side by side, where they come from one product, and are rotated as one tensor.

It is used for Llama, Mistral, Qwen2 and Qwen3 with adapters on all seven linear layers, in the
sampler's role and for at most `MOST_ROWS` rows. Other models, and other sets of adapters, sample
through their own modules.

Shapes: T rows, D hidden size, H query heads, K key-value heads, E head size, F the MLP's width.
"""

import torch

from lowmem_grpo.policy.norm import RMSNorm
from lowmem_grpo.policy.shared_input import SharedInput

__all__ = ["SamplingLayer", "last_hidden", "sampling_layers"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
"""By `model_type`: a name says more than the parts of a layer do, which other architectures have
as well and multiply or add otherwise.
"""
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class SamplingLayer(torch.nn.Module):
    """A layer of the base with the products of its four inputs. It has no parameters of its own."""

    def __init__(self, layer: torch.nn.Module, products: list[SharedInput], window: int | None):
        super().__init__()
        attention = layer.self_attn
        # In tuples: as children they would be the model's twice.
        self._products = tuple(products)
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._head_norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self._act = (layer.mlp.act_fn,)
        self.number, self.size = attention.layer_idx, attention.head_dim
        self.queries = attention.q_proj.out_features // self.size
        self.keys = attention.k_proj.out_features // self.size
        self.scaling, self.window = attention.scaling, window

    def forward(self, x_TD, cos_TE, sin_TE, layout) -> torch.Tensor:
        """[T, D] -> [T, D]. `cos_TE` and `sin_TE`: see `_rotated`."""
        _, of_output, _, of_down = self._products
        x_TD = of_output.joined(self._attended(x_TD, cos_TE, sin_TE, layout)).add_(x_TD)
        return of_down.joined(self._inner(x_TD)).add_(x_TD)

    def _attended(self, x_TD, cos_TE, sin_TE, layout):
        joined = self._products[0].joined(self._norms[0](x_TD))
        query, key, value = self._heads(joined, cos_TE, sin_TE)
        found = layout.attend(self.number, query, key, value, self.scaling, self.window)
        return found.reshape(x_TD.shape[0], -1)

    def _inner(self, x_TD):
        gate_TF, up_TF = self._products[2].products(self._norms[1](x_TD))
        return self._act[0](gate_TF).mul_(up_TF)

    def _heads(self, joined, cos_TE, sin_TE):
        """Rotated queries and keys, and values: [1, H, T, E], [1, K, T, E] twice."""
        queries, rotated = self.queries, self.queries + self.keys
        heads = joined.view(joined.shape[0], -1, self.size)
        query_key = heads[:, :rotated]
        of_query, of_key = self._head_norms
        if of_query is not None:
            query_key = torch.cat(
                [of_query(heads[:, :queries]), of_key(heads[:, queries:rotated])], 1
            )
        query_key = _rotated(query_key, cos_TE, sin_TE).transpose(0, 1)[None]
        value = heads[:, rotated:].transpose(0, 1)[None]
        return query_key[:, :queries], query_key[:, queries:], value


def sampling_layers(causal_lm, shared: list[SharedInput]) -> list[SamplingLayer] | None:
    """One for each layer of a model, as a child of it (what a layer does is told by its name); None
    for a model that samples through its own modules.
    """
    trunk, config = causal_lm.base_model, causal_lm.config
    if config.model_type not in ARCHITECTURES or len(shared) != 4 * config.num_hidden_layers:
        return None
    found = []
    for number, layer in enumerate(trunk.layers):
        products = shared[4 * number : 4 * number + 4]
        parts = dict(layer.self_attn.named_children()) | dict(layer.mlp.named_children())
        expected = [[parts[name] for name in names] for names in TOGETHER]
        norms = layer.input_layernorm, layer.post_attention_layernorm, trunk.norm
        if [each.layers for each in products] != expected or not all(
            isinstance(norm, RMSNorm) for norm in norms
        ):
            return None
        # Mistral's is the model's, Llama has none, whatever its configuration holds besides.
        of = config if config.model_type == "mistral" else layer.self_attn
        found.append(SamplingLayer(layer, products, getattr(of, "sliding_window", None)))
    for layer, own in zip(trunk.layers, found, strict=True):
        layer.add_module("sampling", own)
    return found


def last_hidden(
    causal_lm, layers: list[SamplingLayer], embedded_TD, positions_T, layout
) -> torch.Tensor:
    """Last hidden states [T, D] of embedded tokens, by these layers."""
    base = causal_lm.base_model
    cos_1TE, sin_1TE = base.rotary_emb(embedded_TD[None], position_ids=positions_T[None])
    cos_TE, sin_TE = cos_1TE[0], _signed(sin_1TE[0])
    x_TD = embedded_TD
    for layer in layers[: base.config.num_hidden_layers]:
        x_TD = layer(x_TD, cos_TE, sin_TE, layout)
    return base.norm(x_TD)


def _signed(sin_TE: torch.Tensor) -> torch.Tensor:
    """The first half negated: see `_rotated`."""
    first, second = sin_TE.chunk(2, -1)
    return torch.cat([-first, second], -1)


def _rotated(x_TnE, cos_TE, sin_TE) -> torch.Tensor:
    """Rotary position embedding (arXiv 2104.09864) in halves: x cos + (-x2, x1) sin.

    The sign is the sine's, which is made once for all layers; it rounds as the other way.
    """
    first, second = x_TnE.chunk(2, -1)
    turned = torch.cat([second, first], -1).mul_(sin_TE[:, None])
    return turned.add_(x_TnE * cos_TE[:, None])

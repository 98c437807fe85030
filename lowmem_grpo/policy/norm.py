"""RMSNorm that keeps nothing of the sequence's length in float32.

    y = w * x / rms(x)      rms(x) = sqrt(mean(x^2) + eps)          (arXiv 1910.07467, eq. 4)

transformers computes this in float32 throughout, and autograd then keeps a float32 copy of x, twice
the size of a 16-bit x itself. Here autograd keeps x (a layer's input or residual,
which is there anyway) and one number a row. Rows are walked in tiles, in which everything is
float32; what leaves a tile is rounded as transformers rounds it: x / rms(x) to the dtype of x, then
times w.

With r = 1 / rms(x) and x^ = r x, for a gradient g of y:

    dx = r (w g - x^ mean(w g x^))

Left out: the gradient of w (the base is frozen; a weight that asks for one is refused).

Shapes: T rows, D size of the normed axis; t is the rows of a tile.
"""

import functools

import torch

from lowmem_grpo.policy.tiles import tiles

__all__ = ["RMSNorm", "replace_norms"]

TILE_ELEMENTS = {"cpu": 1 << 18, "card": 1 << 22}
"""Of one tile. On a CPU its float32 copies stay in the cache (docs/performance.md); on a card a
tile is a handful of launches, so it is as large as memory that nobody notices.
"""


class RMSNorm(torch.nn.Module):
    """`weight` [D] and `eps` of a norm of the base; x of [..., D] gives the same."""

    def __init__(self, weight: torch.nn.Parameter, eps: float):
        super().__init__()
        if weight.requires_grad:
            raise ValueError("the norm's weight requires a gradient; a frozen one only")
        self.weight, self.variance_epsilon = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and x.numel() <= TILE_ELEMENTS["cpu"]:  # as in decoding
            return _normed(x, self.weight, self.variance_epsilon)[0]
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_D, eps):
        x_TD = x.reshape(-1, x.shape[-1])
        rows = _tile_rows(x_TD)
        keep = ctx.needs_input_grad[0]
        # What is returned is no view: a layer may go on in place (OLMoE clamps its queries).
        if x_TD.shape[0] <= rows:
            y, inverse = _normed(x, weight_D, eps)
            inverse_T1 = inverse.view(-1, 1)
        else:
            y = x.new_empty(x.shape)
            y_TD = y.view(x_TD.shape)
            inverse_T1 = x_TD.new_empty((len(x_TD), 1), dtype=torch.float32) if keep else None
            for tile in tiles(len(x_TD), rows):
                y_TD[tile], inverse_t1 = _normed(x_TD[tile], weight_D, eps)
                if keep:
                    inverse_T1[tile] = inverse_t1
        if keep:
            ctx.save_for_backward(x, weight_D, inverse_T1)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight_D, inverse_T1 = ctx.saved_tensors
        x_TD, grad_TD = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
        found_TD = torch.empty_like(x_TD)
        rows = _tile_rows(x_TD)
        for tile in tiles(len(x_TD), rows):
            unit_tD = x_TD[tile].float() * inverse_T1[tile]  # of float32 it is x itself
            grad_tD = grad_TD[tile] * weight_D.float()
            along_t1 = (grad_tD * unit_tD).mean(-1, keepdim=True)
            found_TD[tile] = grad_tD.sub_(unit_tD.mul_(along_t1)).mul_(inverse_T1[tile])
        return found_TD.view(x.shape), None, None


def _normed(x_tD, weight_D, eps):
    """y of one tile, and 1 / rms(x) in float32 [t, 1]."""
    wide_tD = x_tD.float()
    inverse_t1 = wide_tD.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide_tD * inverse_t1).to(x_tD.dtype).mul_(weight_D), inverse_t1


def _tile_rows(x_TD) -> int:
    kind = "cpu" if x_TD.device.type == "cpu" else "card"
    return max(1, TILE_ELEMENTS[kind] // x_TD.shape[-1])


def replace_norms(model: torch.nn.Module) -> None:
    """Put an `RMSNorm` in the place of every norm of a frozen model that computes the same."""
    for name, module in list(model.named_modules()):
        if is_rms_norm(type(module)):
            model.set_submodule(name, RMSNorm(module.weight, module.variance_epsilon))


@functools.cache
def is_rms_norm(kind: type) -> bool:
    """Whether a class of norms computes what is above: by what it computes, since classes of that
    name also scale by 1 + w, or take the mean away.
    """
    if not kind.__name__.endswith("RMSNorm") or kind is RMSNorm:
        return False
    with torch.device("cpu"), torch.no_grad():
        try:
            norm = kind(4, eps=0.25)
        except TypeError:
            return False
        if [name for name, _ in norm.named_parameters()] != ["weight"]:
            return False
        if getattr(norm, "variance_epsilon", None) != 0.25:
            return False
        norm.weight.copy_(torch.tensor([0.5, -2.0, 1.0, 3.0]))
        x = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.25, 0.0, -8.0]])
        return torch.allclose(norm(x), _normed(x, norm.weight, 0.25)[0], rtol=1e-5, atol=1e-6)

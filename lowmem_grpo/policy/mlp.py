"""The MLP of a layer in tiles of tokens, forward and backward.

An MLP looks at one token at a time, and at its widest it holds several times the hidden size: for
an 8B model, gate, up, their product and the gradients of all three are 170 KB a token. Here it runs
on a tile of tokens at a time. Forward keeps its input alone; backward computes each tile again and
adds up the adapters' gradients over the tiles, so the peak depends on the tile and not on the
sequence (the idea: Arctic long sequence training, arXiv 2506.13996).

In autograd's graph it is two nodes: the first keeps x and, in backward, computes the tiles again;
the second computes the output and keeps nothing. Under layer checkpointing, which computes a layer
again until the last thing that is kept has been met, x is the last one, and the output is not
computed a second time for nothing.

Shapes: T tokens, D hidden size; t is the tokens of a tile.
"""

import inspect

import torch

from lowmem_grpo.policy.tiles import tiles

__all__ = ["TiledMLP", "tile_mlps"]

NAME = "mlp"


class TiledMLP(torch.nn.Module):
    """A layer's MLP `plain`, whose children it takes over under their names. `tile`: tokens at a
    time; None: all at once.
    """

    def __init__(self, plain: torch.nn.Module):
        super().__init__()
        for name, child in plain.named_children():
            self.add_module(name, child)
        self.again = _Again(plain)
        self.tile: int | None = None
        self._plain = (plain,)  # in a tuple: as a child it would have its children twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.tile is None or x.numel() <= self.tile * x.shape[-1]:
            return self._plain[0](x)
        if not torch.is_grad_enabled():
            return self.in_tiles(x)
        parameters = [p for p in self.parameters() if p.requires_grad]
        return _Compute.apply(self, _Keep.apply(self, x, *parameters))

    def in_tiles(self, x: torch.Tensor) -> torch.Tensor:
        """The output for x of [..., D], a tile at a time. Records nothing for backward."""
        y = torch.empty_like(x)
        x_TD, y_TD = _rows(x), _rows(y)
        for tile in tiles(len(x_TD), self.tile):
            y_TD[tile] = self._plain[0](x_TD[tile])
        return y


class _Again(torch.nn.Module):
    """One tile in backward: forward once more, and the gradients. A module of its own, so that what
    is allocated here can be told from the rest of backward.
    """

    def __init__(self, plain: torch.nn.Module):
        super().__init__()
        self._plain = (plain,)

    def forward(self, x_tD, grad_tD, parameters, wants_x: bool):
        with torch.enable_grad():
            x_tD = x_tD.detach().requires_grad_(wants_x)
            y_tD = self._plain[0](x_tD)
        wanted = [x_tD] * wants_x + parameters
        return torch.autograd.grad(y_tD, wanted, grad_tD)


class _Keep(torch.autograd.Function):
    """Hands x on. Its gradient is taken for that of the MLP's output, which has the same shape."""

    @staticmethod
    def forward(ctx, mlp, x, *parameters):
        ctx.mlp, ctx.parameters = mlp, list(parameters)
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,), wants_x = ctx.saved_tensors, ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if wants_x else None
        grads = None
        x_TD, grad_TD = _rows(x), _rows(grad)
        for tile in tiles(len(x_TD), ctx.mlp.tile):
            found = list(ctx.mlp.again(x_TD[tile], grad_TD[tile], ctx.parameters, wants_x))
            if wants_x:
                _rows(grad_x)[tile] = found.pop(0)
            if grads is None:
                grads = found
            else:
                torch._foreach_add_(grads, found)
        return None, grad_x, *grads


class _Compute(torch.autograd.Function):
    """The output from what `_Keep` handed on; its gradient goes back as it is."""

    @staticmethod
    def forward(ctx, mlp, x):
        return mlp.in_tiles(x)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x of [..., D] as [T, D], a view where x is contiguous."""
    return x.reshape(-1, x.shape[-1])


def tile_mlps(model: torch.nn.Module) -> list[TiledMLP]:
    """Put a `TiledMLP` in the place of every layer's MLP. To be done when adapters are attached:
    PEFT replaces children, of which there would be two then.

    A layer's MLP is the module of that name that is made of linear layers and activations alone.
    """
    found = []
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] == NAME and _looks_at_one_token(module):
            model.set_submodule(name, TiledMLP(module))
            found.append(model.get_submodule(name))
    return found


def _looks_at_one_token(module: torch.nn.Module) -> bool:
    if next(module.named_parameters(recurse=False), None) is not None:
        return False
    if len(inspect.signature(module.forward).parameters) != 1:  # Bloom's adds the residual, too
        return False
    own = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return bool(own) and all(isinstance(m, torch.nn.Linear) for m in own)  # PhiMoE has experts

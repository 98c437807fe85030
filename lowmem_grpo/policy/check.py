"""Whether this code computes a model: by a dozen tokens, before anything is trained.

A prompt with two completions goes through the packed forward pass (shared prompt, MLPs in tiles,
tiled head), and is compared with the model's own plain one, row by row. Where the two differ, or
tokens see what they must not, the model is refused, by what it computes rather than by a list of
names. Each question is asked by itself, since small numbers hide much:

- every layer attends once, through the attention that was put there, with keys like its values,
  and with a window where the configuration says so
- the same tokens give the same numbers again, and by their ids what they give by their embeddings
- the last token of each completion changes nothing else: no layer looks ahead, or from one
  completion into the next
- logits are the head's products, also when those are large
- packed and plain logits agree up to rounding, and so do the sampler's

A token's difference is that of its logits, or hidden state, relative to their norm. Rounding may
send a token of a mixture of experts to another expert, so it is half of a row's tokens that must
agree. A leak is exact: no token may differ, unless another change of the same tokens leaves it.
"""

import contextlib
from collections import Counter

import torch

from lowmem_grpo.errors import ModelError
from lowmem_grpo.out_of_memory import is_out_of_memory
from lowmem_grpo.policy.attention import ATTENTION
from lowmem_grpo.policy.base import Policy
from lowmem_grpo.policy.supported import OWN_ATTENTION, UnsupportedError
from lowmem_grpo.quiet import quiet_libraries

__all__ = ["check_forward", "share_inputs", "supported"]

# What is checked: the tokens of a prompt, of its completions, and of an MLP's tile.
PROMPT, OWN = 5, (3, 4)
CHECKED_TILE = 5
_FOREIGN = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
LARGE = 1000.0  # logits that a soft cap, of 15 to 50, changes beyond rounding


def share_inputs(policy: Policy, name: str) -> None:
    """Find the layers that sample together, in a forward pass. Raises ModelError where it cannot
    be made.
    """
    with policy.as_reference(), quiet_libraries(), supported(policy, name):
        checked = _Checked(policy)
        layout = _Watched(checked.layout)
        policy.share_inputs(lambda: policy.logits(checked.hidden(layout=layout)))


def check_forward(policy: Policy, name: str) -> None:
    """Raises ModelError where this code does not compute the model; see the module's docstring."""
    checked = _Checked(policy)
    exact = policy.dtype == torch.float32
    # Rounding alone gives 1e-6 in float32; 0.023 in bfloat16 on SmolLM2-135M's thirty layers.
    limit, same = (1e-3, 1e-5) if exact else (7e-2, 4e-3)
    with policy.as_reference(), quiet_libraries(), supported(policy, name):
        policy.set_mlp_tile(CHECKED_TILE)
        try:
            layout = _Watched(checked.layout)
            hidden_TD = checked.hidden(layout=layout)
            layout.check(policy)
            _check_inputs(policy, checked, hidden_TD, same)
            _check_causes(policy, checked, hidden_TD, same)
        finally:
            policy.set_mlp_tile(0)
        ours_TV = policy.logits(hidden_TD)
        plain_TV = _plain(policy, checked.ids_T)
    with policy.as_sampler(), supported(policy, name):
        sampled_TV = policy.logits(checked.hidden())
    # Fresh adapters add nothing, so the sampler's logits are the base's.
    pairs = {"packed": (ours_TV, plain_TV), "sampler's": (sampled_TV, ours_TV)}
    for what, (found_TV, expected_TV) in pairs.items():
        errors_T = _differences(found_TV, expected_TV)
        # Row by row: where something leaks from one completion into the next, only that differs.
        error = torch.stack([errors_T[row].median() for row in checked.rows]).max().item()
        if not error <= limit:
            raise _refused(
                policy,
                name,
                f"the {what} forward pass differs from the model's own by {error:.2g} "
                f"(limit {limit:g})",
            )


class _Checked:
    """The tokens that are looked at: a prompt with two completions."""

    def __init__(self, policy: Policy):
        vocab, generator = policy.head_weight_VD.shape[0], torch.Generator().manual_seed(0)
        ids_T = torch.randint(0, vocab, (PROMPT + sum(OWN),), generator=generator)
        starts = (0, PROMPT), *((PROMPT, PROMPT + tokens) for tokens in OWN)
        positions_T = torch.cat([torch.arange(*each) for each in starts])
        first = PROMPT + OWN[0]
        self.rows = slice(0, first), slice(first, None)
        # The last token of each completion, which nothing may depend on but itself.
        last = [first - 1, first + OWN[1] - 1]
        self.changed = []
        for step in (1, 2):
            changed_T = ids_T.clone()
            changed_T[last] = (changed_T[last] + step) % vocab
            self.changed.append(changed_T.to(policy.device))
        self.others = [place for place in range(len(ids_T)) if place not in last]
        self._policy = policy
        self.ids_T, self.positions_T = ids_T.to(policy.device), positions_T.to(policy.device)

    @property
    def layout(self):
        return self._policy.layout([(PROMPT, OWN)])

    def hidden(self, ids_T=None, layout=None) -> torch.Tensor:
        """Last hidden states [T, D] by the packed forward pass."""
        ids_T = self.ids_T if ids_T is None else ids_T
        return self._policy.hidden(ids_T, self.positions_T, layout or self.layout)


class _Watched:
    """A layout that notes which layers attend and with which windows, and refuses what it cannot
    compute.
    """

    def __init__(self, layout):
        self._layout = layout
        self._called: Counter[int] = Counter()
        self._windows: set[int] = set()  # layers that have one

    def attend(self, layer, query, key, value, scaling, window=None) -> torch.Tensor:
        if key.shape != value.shape:
            raise UnsupportedError(
                f"its attention has keys of {key.shape[-1]} numbers a head and values of "
                f"{value.shape[-1]} (latent attention), and ours wants them alike"
            )
        self._called[layer] += 1
        if window is not None:
            self._windows.add(layer)
        return self._layout.attend(layer, query, key, value, scaling, window)

    def check(self, policy: Policy) -> None:
        config = policy.causal_lm.config
        layers = range(config.num_hidden_layers)
        without = [layer for layer in layers if not self._called[layer]]
        if len(without) == len(layers):
            raise UnsupportedError(OWN_ATTENTION)
        if without:
            raise UnsupportedError(
                f"{len(without)} of its {len(layers)} layers, first {without[0]}, do not attend: "
                "they mix tokens in a way that does not keep completions apart here"
            )
        if max(self._called.values()) > 1:
            raise UnsupportedError("its layers attend more than once, and the cache knows one")
        kinds = getattr(config, "layer_types", None) or []
        sliding = {layer for layer in layers if "sliding_attention" in kinds[layer : layer + 1]}
        if sliding - self._windows:
            # On a dozen tokens the two would look alike.
            raise UnsupportedError(
                f"its layer {min(sliding - self._windows)} has a sliding window, of which our "
                "attention is not told"
            )


def _check_inputs(policy: Policy, checked: _Checked, hidden_TD, same: float) -> None:
    """By ids what they are by embeddings; if not, it may be noise, which is another reason."""
    by_ids_TD = policy.trunk(
        input_ids=checked.ids_T[None],
        position_ids=checked.positions_T[None],
        use_cache=False,
        layout=checked.layout,
    ).last_hidden_state[0]
    if _differences(by_ids_TD, hidden_TD).median().item() <= same:
        return
    if _differences(checked.hidden(), hidden_TD).median().item() > same:
        raise UnsupportedError("its forward pass is random in train mode (dropout or noise)")
    raise UnsupportedError(
        "it does more with its tokens than look up their embeddings (a multiplier, or inputs for "
        "each layer), which is left out here"
    )


def _check_causes(policy: Policy, checked: _Checked, hidden_TD, same: float) -> None:
    others = checked.others
    for changed_T in checked.changed:
        changed_TD = checked.hidden(changed_T)
        apart_T = _differences(changed_TD[others], hidden_TD[others])
        if apart_T.max().item() <= same:
            return
        others = [
            place for place, apart in zip(others, apart_T.tolist(), strict=True) if apart > same
        ]
    raise UnsupportedError(
        "a token sees more than its prompt and what comes before it in its own completion: its "
        "layers do more than attend"
    )


def _plain(policy: Policy, ids_T) -> torch.Tensor:
    """The model's own logits [T, V], each completion behind a copy of its prompt, by its own
    attention.
    """
    first, found = PROMPT + OWN[0], []
    prompt, head = ids_T[:PROMPT], policy.causal_lm.get_output_embeddings()
    products = []

    def enlarged(module, args, output_1TV):
        """With the first token's much larger: it is the prompt's, which is looked at already."""
        output_1TV = output_1TV.clone()
        output_1TV[:, :1] *= LARGE / output_1TV[:, :1].abs().max()
        products.append(output_1TV[0])
        return output_1TV

    policy.causal_lm.set_attn_implementation("eager")
    try:
        ids = torch.cat([prompt, ids_T[PROMPT:first]])[None]
        found.append(policy.causal_lm(input_ids=ids, use_cache=False).logits[0].float())
        ids = torch.cat([prompt, ids_T[first:]])[None]
        with head.register_forward_hook(enlarged):
            found.append(policy.causal_lm(input_ids=ids, use_cache=False).logits[0].float())
    finally:
        policy.causal_lm.set_attn_implementation(ATTENTION)
    if not products or _differences(found[1], products[0]).max().item() > 1e-2:
        raise UnsupportedError(
            "its logits are more than its head's products (scaled, or soft-capped), which is not "
            "computed here"
        )
    return torch.cat([found[0], found[1][PROMPT:]])


def _differences(found, expected) -> torch.Tensor:
    """float32 [...]: of each token, relative to the expected norm."""
    found, expected = found.float(), expected.float()
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1)


@contextlib.contextmanager
def supported(policy: Policy, name: str):
    """Raises ModelError with the reason for what a forward pass of the block asks in vain."""
    try:
        yield
    except UnsupportedError as error:
        raise _refused(policy, name, str(error)) from error
    except _FOREIGN as error:
        if is_out_of_memory(error):
            raise
        # What is passed to a layer, or asked of it, is this architecture's own affair.
        raise _refused(policy, name, _reason(policy, error)) from error


def _refused(policy: Policy, name: str, reason: str) -> ModelError:
    return ModelError(f"{name} ({type(policy.causal_lm).__name__}) is not supported: {reason}")


def _reason(policy: Policy, error: BaseException) -> str:
    if not policy.causal_lm._supports_attention_backend:
        return OWN_ATTENTION
    names = {id(module): name for name, module in policy.causal_lm.named_modules()}
    where, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if name := names.get(id(module)):
            where = f" in {name} ({type(module).__name__})"
        trace = trace.tb_next
    return f"its forward pass over packed tokens fails{where}, and --debug shows how"

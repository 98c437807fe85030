"""Keys and values of a wave of completions: each prompt's once, each completion's own.

Decoding computes, for one new token a row, softmax attention over [prompt; own] in two products
that share their softmax: all rows of a problem against its one copy of the prompt, and each row
against its own tokens. With G completions of P + C tokens the cache holds P + G C tokens a problem,
where rows by themselves hold G (P + C).

On a CPU a call costs as much as its arithmetic, so there, where prompts are short against the
completions, each row has a copy of its prompt before its own tokens and it all is one product: at
most a quarter more memory. And there a product copies operands that are parts of something larger,
so room for tokens is made as they come; on a card all of it is made at once, and nothing is left in
pieces.

A cache is a layout (see policy/attention.py): the model hands it queries, keys and values layer by
layer.

With 8 bits (see stored.py) what is sampled from is the policy with a rounded cache. Its log-probs
are recorded as drawn, so the ratios of the update correct for it.

Shapes: B problems in the wave, R rows still decoding, H query heads, K key-value heads, E head
size, P longest prompt, C capacity, J the most rows that any problem still has.
"""

from itertools import chain

import torch

from lowmem_grpo.policy.attention import PackedLayout
from lowmem_grpo.rollout.stored import Stored

__all__ = ["Prefill", "WaveCache", "padded_length"]

EIGHTH_FROM = 128  # tokens
SHORT = 4  # times a prompt's length is the least capacity beside which it counts as short


def padded_length(tokens: int) -> int:
    """Tokens of a completion that attention looks at when it has `tokens`: rounded up to a sixteen,
    and from 128 on to an eighth of the power of two below.

    With a length of its own for each token, the scores would have another size each time, and the
    caching allocator of a card would keep the blocks of all of them.
    """
    step = max(EIGHTH_FROM, 1 << tokens.bit_length() - 1) // 8
    return -(-tokens // step) * step


class WaveCache:
    """Keys and values of B prompts and R rows, in 16 or 8 `bits`. Rows of a problem are neighbours,
    in the order of the problems.
    """

    def __init__(
        self,
        prompt_lengths: list[int],
        rows_per_problem: list[int],
        capacity: int,
        device,
        bits: int = 16,
    ):
        self.device, self.bits = device, bits
        self.capacity = capacity
        self.longest = max(prompt_lengths)
        self.lengths_B = torch.tensor(prompt_lengths, device=device)
        problems = torch.arange(len(prompt_lengths))
        self.problem_R = problems.repeat_interleave(torch.tensor(rows_per_problem)).to(device)
        short = self.longest * SHORT <= capacity
        self.grows = torch.device(device).type == "cpu"
        self.copied = self.longest if short and self.grows else 0
        """Tokens before a row's own that are a copy of its prompt."""
        self.tokens = [0] * sum(rows_per_problem)  # of each row, and the same on the device
        self.tokens_R = torch.zeros(len(self.tokens), dtype=torch.int64, device=device)
        self._changes = 0
        self.prompts: dict[int, tuple[Stored, Stored]] = {}  # keys and values of each layer
        self.own: dict[int, tuple[Stored, Stored]] = {}
        self._arrange()

    def _arrange(self) -> None:
        """Where each row stands in a rectangle of [B, J] rows; the whole rectangle is filled when
        no row has left.
        """
        rows = self.problem_R.numel()
        counts_B = torch.bincount(self.problem_R, minlength=self.lengths_B.numel())
        self.per_problem = int(counts_B.max())
        first_B = counts_B.cumsum(0) - counts_B
        within_R = torch.arange(rows, device=self.device) - first_B[self.problem_R]
        full = rows == self.per_problem * self.lengths_B.numel()
        self.slot_R = None if full else self.problem_R * self.per_problem + within_R

    def positions(self) -> torch.Tensor:
        """int64 [R]: the position of each row's next token."""
        return self.lengths_B[self.problem_R] + self.tokens_R

    def advance(self) -> None:
        """The forward pass of one token a row is done."""
        self.tokens = [count + 1 for count in self.tokens]
        self.tokens_R += 1
        self._changes += 1

    def jump(self, tokens: int) -> None:
        """Go on as if every row had so many tokens."""
        self.tokens = [tokens] * len(self.tokens)
        self.tokens_R.fill_(tokens)
        self._changes += 1

    def restart(self, row: int) -> None:
        """Another completion of the same problem begins in this row: it has no tokens yet."""
        self.tokens[row] = 0
        self.tokens_R[row] = 0
        self._changes += 1

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows (int64, ascending) and let go of the others, and of prompts without
        rows.
        """
        kept = rows.tolist()
        self.tokens = [self.tokens[row] for row in kept]
        self.tokens_R = self.tokens_R[rows]
        self._changes += 1
        left_B, self.problem_R = self.problem_R[rows].unique(return_inverse=True)
        if left_B.numel() < self.lengths_B.numel():
            self.lengths_B = self.lengths_B[left_B]
            left = left_B.tolist()
            for stored in chain.from_iterable(self.prompts.values()):
                stored.keep(left)
        for stored in chain.from_iterable(self.own.values()):
            stored.keep(kept)
        self._arrange()

    def attend(self, layer, query, key, value, scaling, window=None) -> torch.Tensor:
        """One token a row: [1, H, R, E], [1, K, R, E] twice -> [1, R, H, E]."""
        _, heads, rows, size = query.shape
        kv_heads = key.shape[1]
        seen = self.copied + self._seen()
        own_key, own_value = self._room(layer, key, seen)
        here = self._here()
        own_key.put_token(key[0].transpose(0, 1), here)
        own_value.put_token(value[0].transpose(0, 1), here)
        query, unit = query[0].transpose(0, 1), 1
        if query.dtype == torch.float16:
            # Unscaled products of models with large key biases leave its range. Exactly a
            # sixteenth: `scaling` would round.
            query, unit = query / 16, 16
        query_RKrE = query.reshape(rows, kv_heads, heads // kv_heads, size)
        scores = _products(query_RKrE, own_key.wide(seen))
        if not self.copied:
            prompt_key, prompt_value = self.prompts[layer]
            of_prompt = self._group(query_RKrE) @ prompt_key.wide().transpose(2, 3)
            scores = torch.cat([self._ungroup(of_prompt), scores], -1)
        # In float32, as what hides is: one pass converts, scales and hides.
        scores = torch.add(self._hidden(window), scores, alpha=unit * scaling)
        weights = scores.softmax(-1).to(query.dtype)
        if self.copied:
            found = _products(weights, own_value.wide(seen))
        else:
            grouped = self._group(weights[..., : self.longest])
            found = self._ungroup(grouped @ prompt_value.wide())
            found = found + _products(weights[..., self.longest :], own_value.wide(seen))
        return found.reshape(1, rows, heads, size)

    def put_prompts(self, layer, key_BKPE, value_BKPE) -> None:
        """Hold the prompts' keys and values, places behind a shorter prompt's end included."""
        if not self.copied:
            self.prompts[layer] = tuple(Stored.of(x, self.bits, -1) for x in (key_BKPE, value_BKPE))
            return
        own_key, own_value = self._room(layer, key_BKPE, self.copied)
        everywhere, before = slice(None), slice(0, self.copied)
        of_rows = (x.index_select(0, self.problem_R) for x in (key_BKPE, value_BKPE))
        key_RKPE, value_RKPE = of_rows
        own_key.put((everywhere, everywhere, everywhere, before), key_RKPE.transpose(2, 3))
        own_value.put((everywhere, everywhere, before, everywhere), value_RKPE)

    def _room(self, layer, like, tokens: int) -> tuple[Stored, Stored]:
        """A layer's own keys and values, with room for so many tokens. `like`: [n, K, n, E]."""
        if layer not in self.own:
            rows, kv_heads, size = self.problem_R.numel(), like.shape[1], like.shape[3]
            room = tokens if self.grows else self.copied + self.capacity
            # Keys lie with their tokens last: a part of them, transposed, is what a product on a
            # CPU would copy first.
            self.own[layer] = (
                Stored.zeros(like, (rows, kv_heads, size, room), self.bits, -2),
                Stored.zeros(like, (rows, kv_heads, room, size), self.bits, -1),
            )
        for stored in self.own[layer]:
            if stored.room < tokens:
                stored.grow(tokens)
        return self.own[layer]

    def _here(self) -> int | torch.Tensor:
        """Where the next token of all rows lies, or of each."""
        if min(self.tokens) == max(self.tokens):
            return self.copied + self.tokens[0]
        return self.copied + self.tokens_R

    def _seen(self) -> int:
        """Places of a completion that attention looks at; those it has not reached are masked."""
        return min(padded_length(max(self.tokens) + 1), self.capacity)

    def _hidden(self, window) -> torch.Tensor:
        """float32 [R, 1, 1, P + places of a completion]: -inf where a row must not look, else 0."""
        if self._hidden_for == (self._changes, window):
            return self._hidden_mask
        prompt_P = torch.arange(self.longest, device=self.device)
        own_T = torch.arange(self._seen(), device=self.device)
        lengths_R1 = self.lengths_B[self.problem_R, None]
        tokens_R1 = self.tokens_R[:, None]
        beyond_RT = own_T > tokens_R1
        hidden = torch.cat([prompt_P >= lengths_R1, beyond_RT], 1)
        if window is not None:
            here_R1 = lengths_R1 + tokens_R1
            place = torch.cat([prompt_P.expand(lengths_R1.shape[0], -1), lengths_R1 + own_T], 1)
            hidden |= place <= here_R1 - window
        hides = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
        # All layers of one token share it (those with and without a window take turns at worst).
        self._hidden_for = (self._changes, window)
        self._hidden_mask = hides[:, None, None]
        return self._hidden_mask

    _hidden_for = None

    def _group(self, x_RKrE):
        """[R, K, r, E] -> [B, K, J r, E]: the rows of a problem side by side."""
        _, kv_heads, repeats, size = x_RKrE.shape
        problems = self.lengths_B.numel()
        if self.slot_R is not None:
            padded = x_RKrE.new_zeros(problems * self.per_problem, kv_heads, repeats, size)
            x_RKrE = padded.index_copy_(0, self.slot_R, x_RKrE)
        grouped = x_RKrE.view(problems, self.per_problem, kv_heads, repeats, size).transpose(1, 2)
        return grouped.reshape(problems, kv_heads, self.per_problem * repeats, size)

    def _ungroup(self, x_BKjE):
        """The inverse of `_group`."""
        problems, kv_heads, joined, size = x_BKjE.shape
        repeats = joined // self.per_problem
        split = x_BKjE.view(problems, kv_heads, self.per_problem, repeats, size).transpose(1, 2)
        rows = split.reshape(problems * self.per_problem, kv_heads, repeats, size)
        return rows if self.slot_R is None else rows.index_select(0, self.slot_R)


def _products(x_RKrn, y_RKnm) -> torch.Tensor:
    """[R, K, r, m]. By `bmm`: for four axes `matmul` does the same in twice the calls."""
    found = torch.bmm(x_RKrn.flatten(0, 1), y_RKnm.flatten(0, 1))
    return found.unflatten(0, x_RKrn.shape[:2])


class Prefill:
    """The layout of the prompts' own forward pass: shared-prefix attention that leaves keys and
    values in a cache.
    """

    def __init__(self, cache: WaveCache, layout: PackedLayout):
        self.cache, self.layout = cache, layout
        problems, longest = cache.lengths_B.numel(), cache.longest
        steps_P = torch.arange(longest, device=cache.device)
        first_B1 = (cache.lengths_B.cumsum(0) - cache.lengths_B)[:, None]
        # Places behind a shorter prompt's end repeat its last token; decoding masks them.
        within_BP = torch.minimum(steps_P, cache.lengths_B[:, None] - 1)
        self.index = (first_B1 + within_BP).flatten()
        self.shape = problems, longest

    def attend(self, layer, query, key, value, scaling, window=None) -> torch.Tensor:
        self.cache.put_prompts(layer, self._rectangle(key), self._rectangle(value))
        return self.layout.attend(layer, query, key, value, scaling, window)

    def _rectangle(self, x):
        kv_heads, size = x.shape[1], x.shape[3]
        picked = x[0].index_select(1, self.index).view(kv_heads, *self.shape, size)
        return picked.transpose(0, 1).contiguous()

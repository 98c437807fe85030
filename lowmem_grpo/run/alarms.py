"""What goes wrong in a GRPO run and looks like a curve in the morning: said when it begins, and a
field of the step's record while it lasts.

    sampler_apart       sampler_kl of this step above 0.05. Rounding gives 1e-9 in float32 and 4e-3
                        in bfloat16; a wrong mask or a missing adapter gives more
    adapters_still      there was a gradient and the adapters did not change
    no_signal           of the last ten steps' groups nine in ten had no advantages
    constant_reward     a reward of what is said gave every completion of the last ten steps one
                        value
    reward_failing      a reward failed for a tenth of the completions of the last ten steps
    entropy_collapse    the mean entropy of the last ten steps is under a tenth of the first ten's
    kl_runaway          the mean KL of the last ten steps is above 1 nat a token
    length_runaway      half of the last ten steps' completions were cut off, and not a quarter of
                        the first ten's
    reward_hacking      a penalty or the format went up by a fifth since the first ten steps, and
                        no other reward by a fiftieth, though there was room

Those of ten steps begin with the tenth, those that compare with the first ten with the twentieth.
They are functions of the records alone, so a resumed run says the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from statistics import fmean
from typing import Any

from lowmem_grpo.errors import DamageError

__all__ = ["WINDOW", "Alarms"]

WINDOW = 10  # steps
SAMPLER_KL = 0.05
FLAT_GROUPS = 0.9
ENTROPY_LEFT = 0.1
FAILING = 0.1  # share of completions
MOST_KL = 1.0  # nat a token
CUT_OFF, CUT_OFF_BEFORE = 0.5, 0.25  # shares of completions
UP, FLAT, ROOM = 0.2, 0.02, 0.95
FORM = ("format", "overlong", "repetition")
"""Rewards of how something is said; the others are of what is said."""


class Alarms:
    """`records`: those of the steps before, if the run goes on. Raises DamageError for one that is
    none.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        self._first: list[dict[str, Any]] = []
        self._last: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._active: set[str] = set()
        self._steps = 0
        for record in records:
            try:
                self.step(record)
            except (KeyError, TypeError, AttributeError) as error:
                raise DamageError(
                    f"metrics.jsonl, step {record.get('step')}: not the record of a step "
                    f"({type(error).__name__}: {error}): mend or remove its line"
                ) from error

    def step(self, record: dict[str, Any]) -> list[str]:
        """Put the names of what is wrong into the record, as `alarms`; returns what is new, in
        words.
        """
        self._steps += 1
        if len(self._first) < WINDOW:
            self._first.append(record)
        self._last.append(record)
        found = dict(self._found(record))
        new = [text for name, text in found.items() if name not in self._active]
        self._active = set(found)
        record["alarms"] = sorted(found)
        return [f"step {record['step']}: {text}" for text in new]

    def _found(self, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
        apart = record["sampler_kl"] or 0.0
        if apart > SAMPLER_KL:
            text = f"sampler and trainer disagree (sampler_kl {apart:.3f}): "
            yield "sampler_apart", text + "ratios are not those of the policy that sampled"
        # Without a gradient (equal rewards, fresh adapters) there is nothing to move them.
        if record["grad_norm"] and record["tokens_trained"] and record["adapter_change"] == 0.0:
            yield "adapters_still", "the adapters did not change"
        if self._steps >= WINDOW:
            yield from self._of_the_last()
        if self._steps >= 2 * WINDOW:
            yield from self._since_the_first()

    def _of_the_last(self) -> Iterator[tuple[str, str]]:
        flat = self._mean("frac_reward_zero_std")
        if flat >= FLAT_GROUPS:
            text = f"{flat:.0%} of the groups of {WINDOW} steps have no advantages, and teach "
            yield "no_signal", text + "nothing: other problems, or a higher temperature?"
        constant = {
            name
            for name in set.intersection(*(set(r.get("constant_rewards", ())) for r in self._last))
            if name.rstrip("_0123456789") not in FORM  # which is what one wants of them
            and len({record["rewards"][name] for record in self._last}) == 1
        }
        if constant:
            text = f"the reward {', '.join(sorted(constant))} gave every completion of {WINDOW} "
            yield "constant_reward", text + "steps one value"
        failing = {
            name
            for name in set().union(*(r.get("reward_failures", ()) for r in self._last))
            if self._failed(name) >= FAILING
        }
        if failing:
            text = (
                f"the reward {', '.join(sorted(failing))} failed for {FAILING:.0%} or more of the "
            )
            yield "reward_failing", text + f"completions of {WINDOW} steps"
        kl = self._mean("kl")
        if kl is not None and kl > MOST_KL:
            text = f"the KL from the reference is {kl:.2f} nat a token over {WINDOW} steps: "
            yield "kl_runaway", text + "a lower learning rate, or a higher grpo.beta?"

    def _since_the_first(self) -> Iterator[tuple[str, str]]:
        before, now = self._mean("entropy", self._first), self._mean("entropy")
        if before and now is not None and now < ENTROPY_LEFT * before:
            text = f"the entropy fell from {before:.3f} to {now:.3f} nat a token: "
            yield "entropy_collapse", text + "soon all completions of a problem are the same"
        cut = "completion_truncated_fraction"
        before, now = self._mean(cut, self._first), self._mean(cut)
        if now >= CUT_OFF and before < CUT_OFF_BEFORE:
            text = f"{now:.0%} of the completions of {WINDOW} steps were cut off, "
            yield "length_runaway", text + f"{before:.0%} of the first ones"
        up = self._only_form_went_up()
        if up:
            text = f"{', '.join(up)} went up since the first {WINDOW} steps and nothing else did: "
            yield "reward_hacking", text + "is it worth more than being right?"

    def _only_form_went_up(self) -> list[str]:
        names, up = list(self._last[-1]["rewards"]), []
        for name in names:
            before, now = self._of(name, self._first), self._of(name, self._last)
            if name.rstrip("_0123456789") in FORM:
                up += [name] if now - before >= UP else []
            elif now - before >= FLAT or now >= ROOM:
                return []
        return up if len(up) < len(names) else []

    def _mean(self, name: str, records=None) -> float | None:
        values = [r[name] for r in (records or self._last) if r[name] is not None]
        return fmean(values) if values else None

    def _of(self, name: str, records) -> float:
        """The mean of a reward, where it gave any value; else 0."""
        values = [record["rewards"][name] for record in records]
        return fmean([value for value in values if value is not None] or [0.0])

    def _failed(self, name: str) -> float:
        """The share of the last steps' completions for which a reward failed."""
        known = [record for record in self._last if "reward_failures" in record]
        failed = sum(sum(record["reward_failures"].get(name, {}).values()) for record in known)
        return failed / sum(record["rollouts"] for record in known)

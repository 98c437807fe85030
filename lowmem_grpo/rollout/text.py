"""The text of a completion: what rewards, rollouts.jsonl, `sample` and `eval` see of its tokens.

Special tokens. With `rollout.skip_special_tokens = "auto"` texts lack the tokens that end or frame
a turn: tokens with a role in the tokenizer (bos, eos, pad, unk, ...), those that the chat template
writes around messages, and the token that ended the completion. Other special tokens stay, such as
<answer> or [TOOL_CALLS], and so do pairs like <think> and </think>: a reward may look for them.
`true` leaves out all special tokens, `false` none.

Beginnings. Where the chat template begins the assistant's turn with more than its header
("<think>\\n"), or the prompt ends with the beginning of an assistant's message, the model goes on
from there. With `rollout.include_prefill` the text begins with it, so that
`format:<think>.*</think>.*` can match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from lowmem_grpo.chat_template import TemplateTimeout, apply_chat_template
from lowmem_grpo.rollout.prompts import opening
from lowmem_grpo.tasks.base import Problem

__all__ = ["Texts"]

# Characters of the private use areas, which no template looks for.
_QUESTION, _REPLY = "\ue0a1\ue0a2\ue0a3", "\ue0b1\ue0b2\ue0b3"
_TAG = re.compile(r"</?(\w[\w-]+)>")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SHOWN = 8


@dataclass(frozen=True)
class Texts:
    """Turns tokens into text, see the module. `template`: what the chat template is given beside
    the messages.
    """

    tokenizer: Any
    skip_special_tokens: bool | Literal["auto"] = "auto"
    include_prefill: bool = True
    template: dict[str, Any] | None = None

    def prefill(self, problem: Problem) -> str:
        """What the texts of completions of that problem begin with."""
        return self._opening(problem) if self.include_prefill else ""

    def own(self, ids: Sequence[int], ended: bool = False) -> str:
        """The text of tokens without a beginning from the prompt. `ended`: the last one ended the
        completion.
        """
        if self.skip_special_tokens != "auto":
            skip = self.skip_special_tokens
            return self.tokenizer.decode(list(ids), skip_special_tokens=skip)
        ids = list(ids)
        if ended and ids and ids[-1] not in self._tags:
            ids = ids[:-1]
        left = [token for token in ids if token not in self.left_out]
        return self.tokenizer.decode(left, skip_special_tokens=False)

    @cached_property
    def left_out(self) -> frozenset[int]:
        """The special tokens that "auto" leaves out wherever they stand."""
        named = {getattr(self.tokenizer, f"{role}_token_id", None) for role in _ROLES}
        return frozenset((named | self._framing) & self._special - self._tags)

    def lines(self, problem: Problem) -> list[str]:
        """What a person should know of the texts, a line each; of a first problem's."""
        found = []
        tags = sorted(self._special & self._tags)
        names = " ".join(map(self._word, tags[:_SHOWN]))
        more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
        if tags and self.skip_special_tokens is True:
            found.append(
                f"texts of completions lack the special tokens {names}{more}: rewards do not see "
                "them (rollout.skip_special_tokens)"
            )
        elif tags:
            found.append(
                f"texts of completions keep the special tokens {names}{more} "
                "(rollout.skip_special_tokens)"
            )
        if beginning := self._opening(problem):
            word = "with" if self.include_prefill else "without"
            found.append(
                f"the prompt ends in the assistant's turn with {_cut(beginning)}: texts of "
                f"completions are {word} it (rollout.include_prefill)"
            )
        return found

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(i for i, token in added if token.special) | frozenset(
            self.tokenizer.all_special_ids
        )

    @cached_property
    def _tags(self) -> frozenset[int]:
        """Tokens of a pair <name> and </name>, which frames a part of a text."""
        words = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        names = [match[1] for match in map(_TAG.fullmatch, words) if match]
        pairs = [(f"<{name}>", f"</{name}>") for name in names]
        return frozenset(words[word] for pair in pairs if words.keys() >= {*pair} for word in pair)

    @cached_property
    def _framing(self) -> frozenset[int]:
        """The tokens that the chat template writes around a conversation's messages."""
        user, reply = _message("user", _QUESTION), _message("assistant", _REPLY)
        system = _message("system", _QUESTION)
        found: set[int] = set()
        for messages in ([user, reply, user], [system, user]):
            text = _rendered(self.tokenizer, messages, self.template, add_generation_prompt=False)
            if text is not None:
                found.update(self.tokenizer(text, add_special_tokens=False).input_ids)
        return frozenset(found)

    def _opening(self, problem: Problem) -> str:
        messages, template = list(problem.messages), self.template or {}
        return opening(self.tokenizer, messages, template, problem.id)

    def _word(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))


def _rendered(
    tokenizer, messages: list[dict[str, Any]], template: dict[str, Any] | None, **how: Any
) -> str | None:
    """None where the template refuses such a conversation: some want other roles."""
    try:
        return apply_chat_template(tokenizer, messages, **how, **(template or {}))
    except TemplateTimeout:
        raise
    except Exception:  # a template is a program, which can raise anything
        return None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _cut(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."

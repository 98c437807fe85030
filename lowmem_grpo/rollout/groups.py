"""Problems -> groups: prompts by chat template, G completions each, decoded to text."""

from collections.abc import Callable
from typing import Any

from lowmem_grpo.errors import TaskError
from lowmem_grpo.rollout.prompts import render
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling, uniforms
from lowmem_grpo.rollout.text import Texts
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem

__all__ = ["end_token_ids", "prompt_ids", "prompt_length", "sample_groups"]


def prompt_ids(
    tokenizer,
    problem: Problem,
    max_prompt_length: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of the problem's messages under the chat template, ready for the assistant's turn
    or what is left of it (see prompts.py). `chat_template_kwargs`: what the template is given
    beside the messages.

    Raises TaskError for a prompt of more than `max_prompt_length` tokens: cutting it would ask
    another question. Raises ModelError for a chat template that fails, or leaves a message out.
    """
    ids = _ids(tokenizer, problem, chat_template_kwargs)
    if len(ids) > max_prompt_length:
        raise TaskError(
            f"the prompt of problem {problem.id} has {len(ids)} tokens, the limit is "
            f"{max_prompt_length}: use --max-prompt-length {len(ids)}, or leave out every longer "
            "prompt with --set task.filter_overlong_prompts=true"
        )
    return ids


def prompt_length(
    tokenizer, problem: Problem, chat_template_kwargs: dict[str, Any] | None = None
) -> int:
    """How many token ids `prompt_ids` gives, of any number. Raises ModelError as it does."""
    return len(_ids(tokenizer, problem, chat_template_kwargs))


def _ids(tokenizer, problem: Problem, chat_template_kwargs: dict[str, Any] | None) -> list[int]:
    text = render(tokenizer, list(problem.messages), chat_template_kwargs or {}, problem.id)
    return tokenizer(text, add_special_tokens=False).input_ids


def end_token_ids(policy) -> tuple[int, ...]:
    """Every token that ends a completion: the tokenizer's, and those of the model's generation
    settings.
    """
    named = policy.causal_lm.generation_config.eos_token_id
    more = named if isinstance(named, list) else [named]
    return tuple(sorted({policy.tokenizer.eos_token_id, *(i for i in more if i is not None)}))


def sample_groups(
    policy,
    problems: list[Problem],
    *,
    num_generations: int,
    sampling: Sampling,
    seed: int,
    step: int,
    first_place: int = 0,
    max_prompt_length: int,
    batch_size: int,
    chat_template_kwargs: dict[str, Any] | None = None,
    adapters: bool = True,
    texts: Texts | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
) -> list[Group]:
    """Sample `num_generations` completions of each problem from the policy as it is now, or without
    `adapters` from its base. `first_place`: groups that the step has already; each place has random
    numbers of its own. `texts`: how tokens become text, as is the default where it is left out.
    """
    prompts = [
        prompt_ids(policy.tokenizer, problem, max_prompt_length, chat_template_kwargs)
        for problem in problems
    ]
    requests = [
        Request(
            prompt,
            [
                uniforms(seed, step, place, i, sampling.max_completion_length)
                for i in range(num_generations)
            ],
        )
        for place, prompt in enumerate(prompts, first_place)
    ]
    with policy.as_sampler() if adapters else policy.as_reference():
        completions = sample(
            policy,
            requests,
            sampling,
            end_ids=end_token_ids(policy),
            batch_size=batch_size,
            advance=advance,
        )
    texts = texts or Texts(policy.tokenizer, template=chat_template_kwargs)
    groups = []
    for problem, prompt, drawn in zip(problems, prompts, completions, strict=True):
        beginning = texts.prefill(problem)
        rollouts = [
            Rollout(
                completion_ids=c.ids,
                logprobs=c.logprobs,
                entropies=c.entropies if sampling.entropies else None,
                finish_reason="stop" if c.ended else "length",
                text=beginning + texts.own(c.ids, c.ended),
            )
            for c in drawn
        ]
        groups.append(Group(problem, prompt, rollouts))
    return groups

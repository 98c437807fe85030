"""Problems to groups: prompts, texts, reasons to stop, and what the random numbers depend on."""

from copy import copy

import pytest

from lowmem_grpo.errors import ModelError, TaskError
from lowmem_grpo.rollout.groups import end_token_ids, prompt_ids, sample_groups
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.tasks.base import Problem

PROBLEMS = [
    Problem("sum/1", ({"role": "user", "content": "1 + 2"},), "3"),
    Problem("sum/2", ({"role": "user", "content": "1 + 2 + 3 + 4 + 5"},), "15"),
    Problem("sum/3", ({"role": "user", "content": "7"},), "7"),
]


def draw(policy, problems=PROBLEMS, *, seed=0, step=0, num_generations=4, batch_size=64):
    return sample_groups(
        policy,
        problems,
        num_generations=num_generations,
        sampling=Sampling(max_completion_length=12),
        seed=seed,
        step=step,
        max_prompt_length=200,
        batch_size=batch_size,
    )


def ids(groups):
    return [[rollout.completion_ids for rollout in group.rollouts] for group in groups]


def test_groups_hold_their_problem_prompt_and_rollouts(policy):
    groups = draw(policy)
    tokenizer = policy.tokenizer
    assert [group.problem for group in groups] == PROBLEMS
    for group in groups:
        text = tokenizer.apply_chat_template(
            list(group.problem.messages), tokenize=False, add_generation_prompt=True
        )
        assert group.prompt_ids == tokenizer(text, add_special_tokens=False).input_ids
        assert len(group.rollouts) == 4
        for rollout in group.rollouts:
            assert len(rollout.completion_ids) == len(rollout.logprobs) <= 12
            assert all(logprob < 0 for logprob in rollout.logprobs)
            assert rollout.ref_logprobs is rollout.entropies is None


def test_text_is_without_special_tokens(policy):
    special = set(policy.tokenizer.all_special_ids)
    seen = set()
    for group in draw(policy, num_generations=30):
        for rollout in group.rollouts:
            plain = [token for token in rollout.completion_ids if token not in special]
            assert rollout.text == policy.tokenizer.decode(plain)
            seen |= special & set(rollout.completion_ids)
    assert seen  # some were there to be left out


def test_finish_reason(policy):
    rollouts = [r for group in draw(policy, num_generations=30) for r in group.rollouts]
    ends = end_token_ids(policy)
    for rollout in rollouts:
        assert not set(rollout.completion_ids[:-1]) & set(ends)
        ended = rollout.completion_ids[-1] in ends
        assert rollout.finish_reason == ("stop" if ended else "length")
        assert ended or len(rollout.completion_ids) == 12
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_a_rollout_depends_on_seed_step_problem_and_rollout_alone(policy):
    drawn = ids(draw(policy))
    assert ids(draw(policy)) == drawn
    assert ids(draw(policy, batch_size=3)) == drawn
    assert [group[:2] for group in drawn] == ids(draw(policy, num_generations=2))
    assert ids(draw(policy, PROBLEMS[:2])) == drawn[:2]
    assert ids(draw(policy, seed=1)) != drawn
    assert ids(draw(policy, step=1)) != drawn
    for group in drawn:
        assert len({tuple(completion) for completion in group}) > 1
    # The same question twice in a step is answered independently.
    twice = ids(draw(policy, [PROBLEMS[0], PROBLEMS[0]]))
    assert twice[0] != twice[1]


def test_a_prompt_longer_than_the_limit_is_named(policy):
    length = len(prompt_ids(policy.tokenizer, PROBLEMS[1], 200))
    assert len(prompt_ids(policy.tokenizer, PROBLEMS[1], length)) == length
    with pytest.raises(TaskError, match=rf"sum/2 has {length} tokens, the limit is {length - 1}"):
        prompt_ids(policy.tokenizer, PROBLEMS[1], length - 1)


def test_the_chat_template_is_given_its_own_settings(policy):
    tokenizer, shown = policy.tokenizer, copy(policy.tokenizer)
    shown.chat_template = "{% if think %}1{% endif %}" + tokenizer.chat_template
    plain = prompt_ids(shown, PROBLEMS[0], 200)
    assert plain == prompt_ids(tokenizer, PROBLEMS[0], 200)
    assert prompt_ids(shown, PROBLEMS[0], 200, {"think": True}) == tokenizer("1").input_ids + plain


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "fails on problem sum/1: TemplateSyntaxError: Unexpected end"),
        ("{{ messages[0].nothing.at_all }}", "fails on problem sum/1: UndefinedError"),
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role; give another"),
        ("{{ messages[9 // 0] }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}.{% endfor %}", "OverflowError: Range too big"),
        ("Answer me.", "leaves out the question of problem sum/1"),
    ],
)
def test_a_chat_template_that_is_of_no_use(policy, template, says):
    broken = copy(policy.tokenizer)
    broken.chat_template = template
    with pytest.raises(ModelError) as caught:
        prompt_ids(broken, PROBLEMS[0], 200)
    assert says in str(caught.value)
    assert "model.chat_template" in str(caught.value)


def test_a_chat_template_may_write_the_question_in_its_own_way(policy):
    spelled = copy(policy.tokenizer)
    spelled.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    problem = Problem("p", ({"role": "user", "content": "what?"},), "")
    assert prompt_ids(spelled, problem, 200) == spelled("WHAT?").input_ids


@pytest.mark.parametrize(
    ("named", "expected"), [(None, set()), (5, {5}), ([9, 5], {5, 9})], ids=str
)
def test_every_token_that_ends_is_known(policy, monkeypatch, named, expected):
    monkeypatch.setattr(policy.causal_lm.generation_config, "eos_token_id", named)
    found = end_token_ids(policy)
    assert set(found) == expected | {policy.tokenizer.eos_token_id}
    assert list(found) == sorted(set(found))

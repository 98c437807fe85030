"""Evaluation: intervals, pass@k, majorities, and whose completions are judged."""

from itertools import combinations

import pytest
import torch

from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.run.evaluate import Evaluation, evaluate, pass_at, wilson_interval
from lowmem_grpo.tasks import load_task
from tests.grpo.policies import open_policy


def test_wilson_interval_by_hand():
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415, by the formula with z = 1.96.
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize("total", [1, 7, 200])
def test_intervals_stay_inside_and_contain_the_share(total):
    for correct in range(total + 1):
        low, high = wilson_interval(correct, total)
        assert 0.0 <= low <= correct / total <= high <= 1.0


def test_the_published_widths():
    # +-6.9 points at n = 200 and +-2.7 at n = 1319 for a share of one half.
    for total, half in ((200, 0.069), (1319, 0.027)):
        low, high = wilson_interval(total // 2, total)
        assert (high - low) / 2 == pytest.approx(half, abs=1e-3)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_all_draws_with_a_right_one(count):
    for correct in range(count + 1):
        right = [True] * correct + [False] * (count - correct)
        for k in range(1, count + 1):
            draws = list(combinations(right, k))
            expected = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at(k, count, correct) == pytest.approx(expected)


def several():
    """Three problems, four completions each: (text, strict, lenient)."""
    rows = [
        ["5", "it is 5", "4", "5."],  # two strict, three lenient, which are the majority
        ["7", "8", "8", "8"],  # one right, outvoted
        ["no idea", "none", "9", "no idea"],  # wrong, and the majority is text
    ]
    right = {"5": (True, True), "5.": (True, True), "it is 5": (False, True), "7": (True, True)}
    return [(None, text, *right.get(text, (False, False))) for row in rows for text in row]


def test_several_completions_give_pass_at_k_and_a_majority():
    judged = several()
    found = Evaluation(
        problems=3, strict=3, lenient=4, truncated=6, completions=judged, num_generations=4
    )
    summary = found.summary()
    assert summary["strict_accuracy"] == 0.25
    assert summary["lenient_accuracy"] == pytest.approx(1 / 3)
    assert summary["truncated_fraction"] == 0.5
    assert summary["strict_pass_at_2"] == pytest.approx((5 / 6 + 1 / 2) / 3)
    assert summary["lenient_pass_at_2"] == pytest.approx((1 + 1 / 2) / 3)
    assert summary["strict_pass_at_4"] == pytest.approx(2 / 3)
    assert summary["lenient_maj_at_4"] == pytest.approx(1 / 3)
    assert summary["strict_interval"] == list(wilson_interval(0.75, 3))
    assert "strict 25.0% (3/12" in found.line()
    assert "pass@2 44.4% pass@4 66.7%, lenient 33.3%" in found.line()
    assert found.line().endswith(", maj@4 33.3%")


def test_a_majority_is_judged_whatever_its_form():
    judged = [(None, "the answer is 5", False, True), (None, "5", True, True)]
    found = Evaluation(1, 1, 2, 0, judged, num_generations=2)
    assert found.summary()["lenient_maj_at_2"] == 1.0


def test_summary_and_line_agree():
    found = Evaluation(problems=4, strict=1, lenient=3, truncated=2, completions=[])
    summary = found.summary()
    assert summary["strict_accuracy"] == 0.25
    assert summary["lenient_accuracy"] == 0.75
    assert summary["truncated_fraction"] == 0.5
    assert "strict 25.0% (1/4" in found.line()
    assert "lenient 75.0% (3/4" in found.line()


def test_the_base_is_evaluated_without_the_adapters(tiny_model_dir):
    policy = open_policy(tiny_model_dir)

    def texts(adapters, **sampling):
        found = evaluate(
            policy, load_task("arithmetic", seed=0), num_problems=4, num_generations=3, seed=1,
            sampling=Sampling(max_completion_length=6, **sampling), max_prompt_length=100,
            batch_size=5, adapters=adapters,
        )  # fmt: skip
        return [text for _, text, _, _ in found.completions]

    drawn, base = texts(True), texts(False)
    assert len(drawn) == len(set(drawn)) == 12
    assert drawn == texts(True) != base
    with torch.no_grad():
        for name, parameter in policy.adapter_parameters().items():
            if "lora_B" in name:
                parameter.zero_()
    assert texts(True) == texts(False) == base

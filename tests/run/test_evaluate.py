"""Evaluation: intervals, and greedy judgement of held-out problems."""

import pytest

from lowmem_grpo.run.evaluate import Evaluation, wilson_interval


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


def test_summary_and_line_agree():
    found = Evaluation(problems=4, strict=1, lenient=3, truncated=2, completions=[])
    summary = found.summary()
    assert summary["strict_accuracy"] == 0.25
    assert summary["lenient_accuracy"] == 0.75
    assert summary["truncated_fraction"] == 0.5
    assert "strict 25.0% (1/4" in found.line()
    assert "lenient 75.0% (3/4" in found.line()

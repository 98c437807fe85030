"""Group-relative advantages: the worked example, flat groups, and what must not change them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.grpo.advantages import group_advantages

FIXED = settings(deadline=None, derandomize=True)
# Sixteenths are exact in binary: a shift by one of them rounds nothing.
SIXTEENTHS = st.integers(-160, 160).map(lambda n: n / 16)
GROUPS = st.integers(2, 9).flatmap(
    lambda size: st.lists(
        st.lists(SIXTEENTHS, min_size=size, max_size=size), min_size=1, max_size=4
    )
)


def advantages(rewards, **options):
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), **options)


def test_worked_example():
    rewards = torch.tensor([[1.0, 0, 0, 1, 1, 0, 1, 0]])
    assert rewards.mean().item() == 0.5
    assert rewards.std().item() == pytest.approx(0.53, abs=0.005)
    found = group_advantages(rewards)
    assert found.dtype == torch.float32
    assert [round(a, 2) for a in found[0].tolist()] == [
        *(0.94, -0.94, -0.94, 0.94),
        *(0.94, -0.94, 0.94, -0.94),
    ]


def test_naive_twin_each_group_by_itself():
    rewards = [[0.0, 1.0, 3.0], [10.0, 10.5, 10.0]]
    for row, found in zip(rewards, advantages(rewards).tolist(), strict=True):
        mean = sum(row) / 3
        std = (sum((r - mean) ** 2 for r in row) / 2) ** 0.5
        assert found == pytest.approx([(r - mean) / (std + 1e-4) for r in row], rel=1e-12)


@pytest.mark.parametrize("scaling", ["group", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.7, 1e6 / 3])
def test_equal_rewards_give_exactly_zero(reward, dtype, scaling):
    # Three times 0.1 has a mean that is not 0.1: the rounding must not become an advantage.
    for size in (2, 3, 7):
        rewards = torch.full((1, size), reward, dtype=dtype)
        assert group_advantages(rewards, scaling).tolist() == [[0.0] * size]


def test_a_flat_group_leaves_its_neighbours_alone():
    found = advantages([[0.1, 0.1, 0.1], [0.0, 1.0, 0.1]])
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    assert torch.equal(found[1:], advantages([[0.0, 1.0, 0.1]]))


def test_without_scaling_only_the_mean_goes():
    assert advantages([[4.0, 0.0, 2.0, 2.0]], scale_rewards="none").tolist() == [[2.0, -2, 0, 0]]


def test_another_scaling_is_refused_by_name():
    with pytest.raises(ValueError, match="batch"):
        advantages([[0.0, 1.0]], scale_rewards="batch")


@FIXED
@given(GROUPS, st.sampled_from(["group", "none"]))
def test_advantages_of_a_group_sum_to_zero(rewards, scaling):
    found = advantages(rewards, scale_rewards=scaling)
    assert found.sum(1).abs().max().item() < 1e-9


@FIXED
@given(GROUPS, SIXTEENTHS, st.sampled_from(["group", "none"]))
def test_a_shift_of_all_rewards_changes_nothing(rewards, shift, scaling):
    shifted = [[r + shift for r in group] for group in rewards]
    found = advantages(shifted, scale_rewards=scaling)
    torch.testing.assert_close(
        found, advantages(rewards, scale_rewards=scaling), rtol=1e-9, atol=1e-9
    )


@FIXED
@given(GROUPS)
def test_better_rewards_have_larger_advantages(rewards):
    for row, found in zip(rewards, advantages(rewards).tolist(), strict=True):
        assert sorted(range(len(row)), key=row.__getitem__) == sorted(
            range(len(row)), key=lambda i: (found[i], i)
        )

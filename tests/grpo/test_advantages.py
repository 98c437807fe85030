"""Group-relative advantages: the worked example, flat groups, and what must not change them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.grpo.advantages import gdpo_advantages, group_advantages, step_advantages

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


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
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


def test_the_whole_step_s_deviation_scales_every_group_alike():
    rewards = [[0.0, 1.0, 0.0], [2.0, 2.0, 8.0]]
    flat = [r for row in rewards for r in row]
    mean = sum(flat) / 6
    std = (sum((r - mean) ** 2 for r in flat) / 5) ** 0.5
    expected = [[(r - sum(row) / 3) / (std + 1e-4) for r in row] for row in rewards]
    for found, row in zip(advantages(rewards, scale_rewards="batch"), expected, strict=True):
        assert found.tolist() == pytest.approx(row, rel=1e-12)


def test_leaving_one_out_compares_with_the_others():
    row = [4.0, 0.0, 2.0, 1.0]
    expected = [r - (sum(row) - r) / 3 for r in row]
    found = advantages([row], scale_rewards="none", baseline="leave_one_out")
    assert found[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_rewards_that_sum_to_the_same_are_told_apart():
    right, short = [[1.0, 0.0, 1.0, 0.0]], [[0.0, 0.1, 0.0, 0.1]]
    weights = torch.tensor([0.1, 1.0], dtype=torch.float64)
    both = torch.tensor([right, short], dtype=torch.float64)
    summed = (both * weights[:, None, None]).sum(0)
    assert group_advantages(summed).abs().max().item() < 1e-9
    assert gdpo_advantages(both, weights)[0].tolist() == pytest.approx(
        [-0.866, 0.866] * 2, rel=1e-3
    )


def test_naive_twin_of_several_rewards():
    rewards = [[[0.0, 1.0, 3.0], [10.0, 10.5, 10.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 2.0]]]
    weights = [0.5, 2.0]
    summed = [[0.0] * 3 for _ in range(2)]
    for each, weight in zip(rewards, weights, strict=True):
        for b, row in enumerate(each):
            mean = sum(row) / 3
            std = (sum((r - mean) ** 2 for r in row) / 2) ** 0.5
            for i, r in enumerate(row):
                summed[b][i] += weight * (r - mean) / (std + 1e-4)
    flat = [x for row in summed for x in row]
    mean = sum(flat) / 6
    std = (sum((x - mean) ** 2 for x in flat) / 5) ** 0.5
    found = gdpo_advantages(
        torch.tensor(rewards, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    )
    assert found.flatten().tolist() == pytest.approx(
        [(x - mean) / (std + 1e-4) for x in flat], rel=1e-9
    )


def test_a_group_that_no_reward_tells_apart_has_advantages_of_exactly_zero():
    rewards = torch.tensor([[[0.1] * 3, [0.0, 1, 0]], [[0.7] * 3, [0.2, 0.1, 0]]])
    assert gdpo_advantages(rewards, torch.tensor([1.0, 0.3]))[0].tolist() == [0.0] * 3


@pytest.mark.parametrize("setting", ["scale_rewards", "baseline"])
def test_another_scaling_or_baseline_is_refused_by_name(setting):
    with pytest.raises(ValueError, match=f"{setting} is 'other', expected one of"):
        advantages([[0.0, 1.0]], **{setting: "other"})


@FIXED
@given(GROUPS, st.sampled_from(["group", "batch", "none"]))
def test_advantages_of_a_group_sum_to_zero(rewards, scaling):
    found = advantages(rewards, scale_rewards=scaling)
    assert found.sum(1).abs().max().item() < 1e-9


@FIXED
@given(GROUPS, SIXTEENTHS, st.sampled_from(["group", "batch", "none"]))
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


@pytest.mark.parametrize("scaling", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_a_reward_that_is_not_there_is_as_if_the_rollout_were_not(scaling, baseline):
    nan = float("nan")
    options = {"scale_rewards": scaling, "baseline": baseline}
    found = advantages([[nan, 0.0, 1.0, nan, 3.0], [2.0, 4.0, nan, nan, 5.0]], **options)
    expected = advantages([[0.0, 1.0, 3.0], [2.0, 4.0, 5.0]], **options)
    assert found[0, [1, 2, 4]].tolist() == pytest.approx(expected[0].tolist(), rel=1e-12)
    assert found[1, [0, 1, 4]].tolist() == pytest.approx(expected[1].tolist(), rel=1e-12)
    assert found[0, [0, 3]].tolist() == found[1, [2, 3]].tolist() == [0.0, 0.0]
    alone = advantages([[nan, 0.3, nan], [nan, nan, nan]], **options)
    assert alone.tolist() == [[0.0] * 3] * 2


def test_normalised_by_itself_a_reward_that_is_not_there_gives_nothing():
    nan = float("nan")
    rewards = torch.tensor([[[1.0, 0.0, nan, 0.5]], [[0.2, 0.1, nan, nan]]], dtype=torch.float64)
    found = gdpo_advantages(rewards, torch.tensor([1.0, 2.0], dtype=torch.float64))
    one = advantages([[1.0, 0.0, 0.5]])[0]
    two = advantages([[0.2, 0.1]])[0]
    summed = one + 2.0 * torch.tensor([*two.tolist(), 0.0], dtype=torch.float64)
    expected = (summed - summed.mean()) / (summed.std() + 1e-4)
    assert found[0, [0, 1, 3]].tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert found[0, 2] == 0.0


def test_a_step_s_advantage_is_the_sum_of_the_normalised_rewards_from_it_on():
    nan = float("nan")
    rewards = [[1.0, 0.0, 0.5], [0.0, 1.0, nan], [nan, nan, nan]]
    found = step_advantages(torch.tensor(rewards, dtype=torch.float64)).tolist()
    all_of_them = [1.0, 0.0, 0.5, 0.0, 1.0]
    mean = sum(all_of_them) / 5
    std = (sum((r - mean) ** 2 for r in all_of_them) / 4) ** 0.5
    each = [(r - mean) / (std + 1e-4) for r in all_of_them]
    expected = [[sum(each[:3]), sum(each[1:3]), each[2]], [sum(each[3:]), each[4], 0.0], [0.0] * 3]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-9)
    assert step_advantages(torch.full((2, 2), 0.1)).tolist() == [[0.0, 0.0]] * 2

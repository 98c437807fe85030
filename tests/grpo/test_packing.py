"""Packing: what every scored token is predicted from, and that nothing is lost, doubled or mixed.

The twin knows nothing of how a batch is laid: it walks the layout, asks for each trunk row which
tokens it sees, and compares with the prompt and the completion that a scored token belongs to.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_grpo.grpo.packing import pack, store_reference
from lowmem_grpo.rollout.types import Group, Rollout
from lowmem_grpo.tasks.base import Problem
from tests.grpo.rollouts import make_groups

SHAPE = [(3, [2, 1, 4]), (2, [5, 3, 3]), (1, [1, 1])]


def weights_of(groups):
    return [0.001 * (i + 1) for i in range(sum(len(g.rollouts) for g in groups))]


def contexts(batch):
    """For each trunk row the tokens and positions that it sees, itself included and last."""
    ids, positions = batch.input_ids_T.tolist(), batch.positions_T.tolist()
    seen, at = [], 0
    for prompt, completions in batch.groups:
        prefix = list(range(at, at + prompt))
        seen += [prefix[: i + 1] for i in range(prompt)]
        at += prompt
        for length in completions:
            own = list(range(at, at + length))
            seen += [prefix + own[: i + 1] for i in range(length)]
            at += length
    assert at == len(ids) == len(positions)
    return [([ids[i] for i in rows], [positions[i] for i in rows]) for rows in seen]


def check(groups, batches, *, min_completion_length=0, skip=False):
    """Every token of every rollout that is kept is scored once, in order, with its own numbers."""
    weights = iter(weights_of(groups))
    expected = [
        (group, rollout, advantage, weight)
        for group in groups
        for rollout, advantage, weight in zip(
            group.rollouts, group.advantages, weights, strict=False
        )
        if not (skip and advantage == 0.0)
    ]
    members = [member for batch in batches for member in batch.members]
    assert list(map(id, members)) == [id(rollout) for _, rollout, _, _ in expected]
    remaining = iter(expected)
    for batch in batches:
        seen, n = contexts(batch), 0
        for rollout in batch.members:
            group, _, advantage, weight = next(remaining)
            for t, token in enumerate(rollout.completion_ids):
                ids, positions = seen[batch.rows_N[n]]
                assert ids == group.prompt_ids + rollout.completion_ids[:t]
                assert positions == list(range(len(ids)))
                assert batch.targets_N[n] == token
                assert batch.old_logprobs_N[n] == torch.tensor(rollout.logprobs[t])
                assert batch.advantages_N[n] == torch.tensor(advantage)
                assert batch.weights_N[n] == torch.tensor(weight)
                assert batch.no_end_N[n] == (t < min_completion_length)
                if rollout.ref_logprobs is not None:
                    assert batch.ref_logprobs_N[n] == torch.tensor(rollout.ref_logprobs[t])
                n += 1
        scored = [value for name, value in vars(batch).items() if name.endswith("_N")]
        assert all(len(value) == n for value in scored if value is not None)


def test_layout_of_a_whole_step():
    groups = make_groups(SHAPE, reference=True)
    (batch,) = pack(groups, weights_of(groups), max_tokens=1000)
    # The last token of a completion predicts nothing: 2, 1, 4 tokens are 1, 0, 3 trunk tokens.
    assert batch.groups == ((3, (1, 0, 3)), (2, (4, 2, 2)), (1, (0, 0)))
    assert batch.tokens == 3 + 4 + 2 + 8 + 1
    assert batch.positions_T.tolist()[:7] == [0, 1, 2, 3, 3, 4, 5]
    assert batch.rows_N.tolist()[:7] == [2, 3, 2, 2, 4, 5, 6]
    assert batch.input_ids_T.dtype == batch.targets_N.dtype == torch.int64
    assert batch.weights_N.dtype == batch.old_logprobs_N.dtype == torch.float32
    check(groups, [batch])


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 7), min_size=1, max_size=5)),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 60),
    st.integers(0, 4),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@settings(deadline=None, derandomize=True)
def test_every_token_once_whatever_the_limit(shape, limit, minimum, reference, skip, data):
    groups = make_groups(shape, reference=reference)
    for group in groups:
        for i in range(len(group.rollouts)):
            if data.draw(st.booleans()):
                group.advantages[i] = 0.0
    batches = pack(
        groups,
        weights_of(groups),
        max_tokens=limit,
        min_completion_length=minimum,
        skip_zero_advantage=skip,
    )
    check(groups, batches, min_completion_length=minimum, skip=skip)
    for batch in batches:
        assert batch.tokens <= limit or len(batch.members) == 1


def test_a_group_is_cut_only_where_it_fits_into_no_batch():
    groups = make_groups([(3, [3, 3]), (3, [3, 3]), (3, [3] * 5)])
    batches = pack(groups, weights_of(groups), max_tokens=9)
    assert [batch.groups for batch in batches] == [
        ((3, (2, 2)),),
        ((3, (2, 2)),),
        ((3, (2, 2, 2)),),
        ((3, (2, 2)),),
    ]
    check(groups, batches)


def test_what_is_left_of_a_cut_group_shares_its_batch():
    groups = make_groups([(2, [4, 4, 4]), (1, [3])])
    batches = pack(groups, weights_of(groups), max_tokens=8)
    assert [batch.groups for batch in batches] == [((2, (3, 3)),), ((2, (3,)), (1, (2,)))]
    check(groups, batches)


def test_an_over_long_completion_is_alone():
    groups = make_groups([(2, [3, 50, 3])])
    batches = pack(groups, weights_of(groups), max_tokens=10)
    assert [batch.groups for batch in batches] == [((2, (2,)),), ((2, (49,)),), ((2, (2,)),)]
    check(groups, batches)


def test_an_end_token_that_equals_the_padding_token_is_trained():
    end = pad = 7
    rollout = Rollout([4, pad, end], [-1.0, -2.0, -3.0], "stop", "")
    problem = Problem("p", ({"role": "user", "content": "?"},), "")
    group = Group(problem, [pad, 1], [rollout], advantages=[1.0])
    (batch,) = pack([group], [1.0], max_tokens=100)
    assert batch.targets_N.tolist() == [4, 7, 7]
    assert batch.old_logprobs_N.tolist() == [-1.0, -2.0, -3.0]
    assert batch.input_ids_T.tolist() == [7, 1, 4, 7]


def test_zero_advantages_are_left_out_on_request_only():
    groups = make_groups(SHAPE)
    groups[0].advantages = [0.0, 0.5, 0.0]
    groups[1].advantages = [0.0, 0.0, 0.0]
    kept = pack(groups, weights_of(groups), max_tokens=1000)
    assert sum(len(batch.members) for batch in kept) == 8
    (batch,) = pack(groups, weights_of(groups), max_tokens=1000, skip_zero_advantage=True)
    # A group without advantages costs nothing, its prompt included; later weights keep their place.
    assert batch.groups == ((3, (0,)), (1, (0, 0)))
    assert batch.weights_N.tolist() == pytest.approx([0.002, 0.007, 0.008])
    check(groups, [batch], skip=True)


def test_nothing_to_train_on_is_no_batch():
    groups = make_groups([(3, [2, 2])])
    groups[0].advantages = [0.0, 0.0]
    assert pack(groups, weights_of(groups), max_tokens=9, skip_zero_advantage=True) == []


def test_reference_finds_its_way_back_through_cut_groups():
    groups = make_groups(SHAPE)
    batches = pack(groups, weights_of(groups), max_tokens=6)
    assert len(batches) > 3
    assert batches[0].ref_logprobs_N is None
    # The old log-probs stand in for the reference's: each rollout must get those of its own tokens.
    for batch in batches:
        store_reference(batch, batch.old_logprobs_N)
    for group in groups:
        for rollout in group.rollouts:
            assert rollout.ref_logprobs == pytest.approx(rollout.logprobs)
    check(groups, pack(groups, weights_of(groups), max_tokens=11))


def test_to_moves_tensors_and_keeps_the_rest():
    groups = make_groups(SHAPE)
    (batch,) = pack(groups, weights_of(groups), max_tokens=1000)
    moved = batch.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 8
    assert all(value.device.type == "meta" for value in tensors)
    assert moved.members is batch.members
    assert moved.ref_logprobs_N is None


@pytest.mark.parametrize(
    ("old_policy", "field", "missing"),
    [
        ("base", "ref_logprobs", "all"),
        ("base", "ref_logprobs", "one"),
        ("sampler", "ref_logprobs", "one"),
        ("trainer", "old_logprobs", "one"),
        ("trainer", "old_logprobs", "last token"),
        ("sampler", "logprobs", "last token"),
        ("sampler", "entropies", "all"),
    ],
)
def test_missing_numbers_are_not_made_up(old_policy, field, missing):
    groups = make_groups(SHAPE, reference=True)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for rollout in rollouts:
        rollout.old_logprobs = [x - 0.5 for x in rollout.logprobs]
        rollout.entropies = [1.0] * len(rollout.logprobs)
    weights = weights_of(groups)
    how = {"max_tokens": 1000, "old_policy": old_policy, "entropy_threshold": 0.5}
    (batch,) = pack(groups, weights, **how)
    own = {"base": "ref_logprobs", "trainer": "old_logprobs", "sampler": "logprobs"}[old_policy]
    expected = [x for rollout in rollouts for x in getattr(rollout, own)]
    assert torch.equal(batch.old_logprobs_N, torch.tensor(expected))
    for rollout in rollouts if missing == "all" else rollouts[4:5]:
        there = getattr(rollout, field)[:-1] if missing == "last token" else None
        setattr(rollout, field, there)
    with pytest.raises(ValueError, match=r"tokens has \d of the (reference|trainer|sampler)'s"):
        pack(groups, weights, **how)


def test_before_the_first_update_the_trainers_are_not_known():
    groups = make_groups(SHAPE)
    (batch,) = pack(groups, weights_of(groups), max_tokens=1000, old_policy="trainer")
    assert not batch.old_is_known

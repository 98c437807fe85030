"""How much work a step is, in counts: what a change that makes steps slower shows.

Seconds depend on the machine, these do not: forward passes of the trunk, tokens through it, rows
through the head, products with 4-bit weights and unpacked weights, and the bytes at the peak of
each phase, for one fixed step.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_grpo.grpo.objective import Objective
from lowmem_grpo.grpo.packing import pack
from lowmem_grpo.grpo.update import Scoring, accumulate, score_reference
from lowmem_grpo.memory.measure import alive
from lowmem_grpo.memory.simulate import add_up
from lowmem_grpo.memory.trace import Recorder
from lowmem_grpo.rollout.groups import end_token_ids, sample_groups
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.tasks.base import Problem
from tests.grpo.policies import open_policy

LAYERS, LINEAR, INPUTS = 2, 7, 4  # of the tiny model; of a layer, with so many different inputs
G, C = 4, 6
QUESTIONS = "1 + 2", "1 + 2 + 3 + 4 + 5"
CLIP = {"epsilon": 0.2, "epsilon_high": 0.2}
BUDGET = 10_000  # tokens of a micro-batch: all of them


class Operations(TorchDispatchMode):
    """Counts the operations that run within."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Work:
    """What the policy was asked to compute, by phase."""

    def __init__(self, policy):
        self.policy, self.counts, self.peaks = policy, {}, {}
        self._plain = {name: getattr(policy, name) for name in ("hidden", "logits", "score")}

    def run(self, name, phase):
        found = self.counts[name] = Counter()

        def hidden(input_ids_T, *rest):
            found["forwards"] += 1
            found["trunk"] += len(input_ids_T)
            return self._plain["hidden"](input_ids_T, *rest)

        def counted(kind):
            def call(hidden_ND, *rest, **options):
                found["head"] += len(hidden_ND)
                return self._plain[kind](hidden_ND, *rest, **options)

            return call

        self.policy.hidden = hidden
        self.policy.logits, self.policy.score = counted("logits"), counted("score")
        recorder = Recorder()
        with Operations() as operations, recorder:
            recorder.adopt(alive(self.policy))
            result = phase()
        for method in self._plain:
            delattr(self.policy, method)
        found["products"] = operations.counts["bitsandbytes::gemm_4bit"]
        found["unpacked"] = operations.counts["bitsandbytes::dequantize_4bit"]
        self.peaks[name] = add_up(recorder.events).peak_allocated
        return result


def step(policy, work, *, beta=0.04, group=G, flat=(), budget=BUDGET, batch_size=64):
    """One step of the product's phases; groups of `flat` have no signal. Returns their groups."""
    problems = [
        Problem(f"sum/{i}", ({"role": "user", "content": text},), "") for i, text in
        enumerate(QUESTIONS)
    ]  # fmt: skip
    sampling = Sampling(min_completion_length=C, max_completion_length=C)
    groups = work.run(
        "rollout",
        lambda: sample_groups(
            policy, problems, num_generations=group, sampling=sampling, seed=0, step=0,
            max_prompt_length=100, batch_size=batch_size,
        ),
    )  # fmt: skip
    for place, one in enumerate(groups):
        one.advantages = [0.0 if place in flat else (-1.0) ** i for i in range(group)]
    scoring = Scoring(1.0, end_token_ids(policy))

    def packed():
        rows = [1.0 / len(QUESTIONS) / group] * len(QUESTIONS) * group
        return pack(
            groups, rows, max_tokens=budget, min_completion_length=C, skip_zero_advantage=not beta
        )

    if beta:
        work.run("reference", lambda: score_reference(policy, packed(), scoring))
    objective = Objective(beta=beta, **CLIP)
    work.run(
        "update", lambda: accumulate(policy, packed(), scoring, objective, checkpointing=False)
    )
    for parameter in policy.adapter_parameters().values():
        parameter.grad = None
    return groups


@pytest.fixture
def policy(tiny_model_dir):
    return open_policy(tiny_model_dir)


def test_the_work_of_a_step(policy):
    work = Work(policy)
    groups = step(policy, work)
    prompts = sum(len(group.prompt_ids) for group in groups)
    rows = len(groups) * G
    # A prompt once, whatever the number of its completions, and no completion's last token.
    tokens, linears = prompts + rows * (C - 1), LAYERS * LINEAR
    assert work.counts["rollout"] == {
        "forwards": C, "trunk": tokens, "head": rows * C, "products": C * linears, "unpacked": 0,
    }  # fmt: skip
    assert work.counts["reference"] == {
        "forwards": 1, "trunk": tokens, "head": rows * C, "products": linears, "unpacked": 0,
    }  # fmt: skip
    # Backward has no use for the gradient of the embedding, so the first layer's queries, keys and
    # values are not multiplied by.
    assert work.counts["update"] == {
        "forwards": 1, "trunk": tokens, "head": rows * C, "products": linears,
        "unpacked": linears - 3,
    }  # fmt: skip


def test_rows_without_a_gradient_are_not_computed(policy):
    work = Work(policy)
    groups = step(policy, work, beta=0.0, flat=(1,))
    assert "reference" not in work.counts
    assert work.counts["update"]["trunk"] == len(groups[0].prompt_ids) + G * (C - 1)
    assert work.counts["update"]["head"] == G * C
    step(policy, work, beta=0.0, flat=(0, 1))
    assert work.counts["update"] == {"products": 0, "unpacked": 0}


def test_a_group_that_is_cut_computes_its_prompt_again(policy):
    work = Work(policy)
    groups = step(policy, work, budget=len(QUESTIONS[1]) + 10 + 2 * (C - 1))
    again = work.counts["update"]["forwards"] - len(groups)
    assert again > 0
    whole = sum(len(group.prompt_ids) for group in groups) + len(groups) * G * (C - 1)
    assert work.counts["update"]["trunk"] > whole
    assert work.counts["update"]["head"] == len(groups) * G * C


def test_adapters_of_one_input_are_one_product(policy):
    with policy.as_sampler(), Operations() as operations:
        for _ in range(2):
            policy.hidden(torch.tensor([1, 2]), torch.tensor([0, 1]), policy.layout([(2, ())]))
    assert operations.counts["aten::mm"] == 2 * LAYERS * INPUTS
    assert operations.counts["aten::addmm_"] == 2 * LAYERS * LINEAR
    # Their 16-bit form is made once: in float32 there is nothing to cast.
    assert operations.counts["aten::cat"] < 2 * operations.counts["aten::mm"]


def test_the_bytes_at_the_peak(policy):
    work = Work(policy)
    step(policy, work)
    alone = sum(x.untyped_storage().nbytes() for _, x in alive(policy))
    taken = {name: peak - alone for name, peak in work.peaks.items()}
    # As measured (111,328; 187,312; 825,132), and a tenth more.
    assert taken["rollout"] < 122_500
    assert taken["reference"] < 206_000
    assert taken["update"] < 907_600


def test_more_completions_take_more_steps_and_no_more_memory(policy):
    """At a fixed budget of tokens and of rows, but for the lists of what is to be scored."""
    found = []
    for group in (8, 32):
        work = Work(policy)
        step(policy, work, group=group, budget=46, batch_size=8)  # less than a group of 8
        found.append(work)
    few, many = found
    tokens = many.counts["update"]["trunk"] - few.counts["update"]["trunk"]
    assert tokens > 300
    # The prompt's last hidden state, from which completions begin that take a place later.
    row = policy.trunk.config.hidden_size * policy.dtype.itemsize
    assert many.peaks["rollout"] == few.peaks["rollout"] + row
    for name in ("reference", "update"):
        assert many.peaks[name] - few.peaks[name] < 64 * tokens

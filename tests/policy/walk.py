"""One model compared with transformers' and PEFT's own code, in float32, number by number.

The twin is what anyone would write: `AutoModelForCausalLM` with NF4 layers, `PeftModel` with the
saved adapter, every completion a row by itself behind its own copy of the prompt.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lowmem_grpo.policy.load import nf4_config
from lowmem_grpo.rollout.sampler import Request, sample
from lowmem_grpo.rollout.sampling import Sampling
from lowmem_grpo.run.checkpoint import read_adapter
from tests.grpo.policies import open_policy

__all__ = ["LIMITS", "Walk", "walk"]

# Rows are longer than the sliding windows of tests.families, and of unequal lengths.
GROUPS = ((9, (7, 3, 1)), (4, (5, 8)))
LIMITS = {
    "packed = plain": 2e-5,
    "gradients = PEFT's": 2e-4,
    "sampler = trainer": 2e-5,
    "merged = policy": 2e-5,
    "reloaded = policy": 0.0,
}
"""The largest difference of log-probs in nat, and of a gradient relative to its tensor's norm."""


@dataclass
class Walk:
    """Of each comparison of `LIMITS` the largest difference and how many numbers (of gradients:
    tensors) were compared.
    """

    architecture: str
    differences: dict[str, float]
    counts: dict[str, int]

    def wrong(self) -> dict[str, float]:
        """The comparisons that found more than rounding."""
        return {n: d for n, d in self.differences.items() if not d <= LIMITS[n]}


@dataclass
class Row:
    prompt: list[int]
    own: list[int]


def walk(directory: Path, scratch: Path, attention: str = "sdpa") -> Walk:
    """Compare the model of `directory` under adapters that do something; `scratch`: an empty
    directory.
    """
    policy = open_policy(directory, attention=attention)
    save(policy, scratch / "adapter", str(directory))
    plain = peft_model(directory, scratch / "adapter")
    found = Walk(type(policy.causal_lm).__name__, {}, {})

    def note(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        assert ours.shape == theirs.shape
        assert ours.isfinite().all()
        found.differences[name] = (ours - theirs).abs().max().item()
        found.counts[name] = ours.numel()

    vocab = policy.head_weight_VD.shape[0]
    rows = random_rows(vocab)
    own_N = packed_logprobs(policy, rows)
    theirs_N = torch.cat([row_logprobs(plain, row) for row in rows])
    note("packed = plain", own_N.detach(), theirs_N.detach())
    compare_gradients(policy, plain, own_N, theirs_N, found)

    sampled, logprobs_N = sampled_rows(policy)
    note("sampler = trainer", logprobs_N, packed_logprobs(policy, sampled).detach())
    again = open_policy(directory, attention=attention)
    again.load_adapter_state(read_adapter(scratch / "adapter"))
    with torch.no_grad():
        note("reloaded = policy", packed_logprobs(again, rows), own_N.detach())
        merged = merged_model(policy, scratch / "merged")
        merged_N = torch.cat([row_logprobs(merged, row) for row in rows])
    note("merged = policy", merged_N, own_N.detach())
    return found


def save(policy, directory: Path, base: str) -> None:
    """Write the adapter as PEFT has it."""
    directory.mkdir(parents=True)
    save_file(policy.adapter_state(), directory / "adapter_model.safetensors")
    policy.save_adapter_config(directory, base)


def peft_model(directory: Path, adapter: Path):
    """Plain transformers and PEFT with the same NF4 weights and an adapter that is trained on."""
    config = AutoConfig.from_pretrained(directory)
    for name in vars(config):
        if "drop" in name:
            setattr(config, name, 0.0)
    base = AutoModelForCausalLM.from_pretrained(
        directory,
        config=config,
        quantization_config=nf4_config(torch.float32),
        dtype=torch.float32,
        device_map={"": "cpu"},
        attn_implementation="eager",
    )
    # In train mode, as an eval forward on some CPUs repacks 4-bit weights.
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).train()


def merged_model(policy, directory: Path):
    """The policy as the export writes it, in float32, by plain transformers."""
    from lowmem_grpo.run.merge import merge

    merge(policy, directory, torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def random_rows(vocab: int) -> list[Row]:
    """The rows of `GROUPS`, without the end token 0."""
    generator = torch.Generator().manual_seed(3)

    def draw(count: int) -> list[int]:
        return torch.randint(1, vocab, (count,), generator=generator).tolist()

    rows = []
    for prompt, lengths in GROUPS:
        ids = draw(prompt)
        rows += [Row(ids, draw(length)) for length in lengths]
    return rows


def packed_logprobs(policy, rows: list[Row]) -> torch.Tensor:
    """Log-probs [N] of the completions' tokens, by one packed pass with checkpointed layers."""
    ids, positions, groups, scored, start = [], [], [], [], 0
    for row in rows:
        if not groups or groups[-1][0] != row.prompt:
            groups.append((row.prompt, []))
        groups[-1][1].append(row.own)
    targets = []
    for prompt, completions in groups:
        ids += prompt
        positions += range(len(prompt))
        last, start = start + len(prompt) - 1, start + len(prompt)
        for own in completions:
            trunk = own[:-1]  # as in training: nothing comes after the last token
            ids += trunk
            positions += range(len(prompt), len(prompt) + len(trunk))
            scored += [last, *range(start, start + len(trunk))]
            targets += own
            start += len(trunk)
    layout = policy.layout([(len(p), tuple(len(own) - 1 for own in c)) for p, c in groups])
    with policy.as_trainable(checkpointing=True):
        hidden_TD = policy.hidden(torch.tensor(ids), torch.tensor(positions), layout)
        return policy.score(hidden_TD[scored], torch.tensor(targets))[0]


def row_logprobs(model, row: Row) -> torch.Tensor:
    """Log-probs [C] of a completion by a forward pass of its row alone."""
    ids = torch.tensor([row.prompt + row.own])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
    own = torch.tensor(row.own)[:, None]
    return logits.float().log_softmax(-1).gather(1, own)[:, 0]


def compare_gradients(policy, plain, own_N, theirs_N, found: Walk) -> None:
    """Of a weighted sum of log-probs: every adapter tensor's gradient beside PEFT's."""
    weights_N = torch.randn(len(own_N), generator=torch.Generator().manual_seed(4))
    ours, theirs = policy.adapter_parameters(), dict(plain.named_parameters())
    theirs = {name: p for name, p in theirs.items() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    mine = torch.autograd.grad((own_N * weights_N).sum(), list(ours.values()))
    other = torch.autograd.grad((theirs_N * weights_N).sum(), list(theirs.values()))
    worst = 0.0
    for name, a, b in zip(ours, mine, other, strict=True):
        assert b.norm() > 0, f"{name} has no gradient: nothing is compared"
        worst = max(worst, ((a - b).norm() / b.norm()).item())
    found.differences["gradients = PEFT's"] = worst
    found.counts["gradients = PEFT's"] = len(mine)


def sampled_rows(policy) -> tuple[list[Row], torch.Tensor]:
    """Rows as the sampler draws them, and the log-probs that it writes down [N]."""
    prompts = [Row(prompt, []).prompt for prompt in ([3, 9, 27, 81, 4, 12, 36], [5, 25, 7])]
    generator = np.random.default_rng(5)
    requests = [Request(prompt, list(generator.random((3, 12)))) for prompt in prompts]
    with policy.as_sampler():
        drawn = sample(
            policy, requests, Sampling(max_completion_length=12), end_ids=(0,), batch_size=4
        )
    rows, logprobs = [], []
    for prompt, completions in zip(prompts, drawn, strict=True):
        for completion in completions:
            rows.append(Row(prompt, completion.ids))
            logprobs += completion.logprobs
    return rows, torch.tensor(logprobs)

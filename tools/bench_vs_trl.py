"""Seconds and memory of a GRPO step beside TRL's, on the same machine, for the same work.

    python tools/bench_vs_trl.py --workload short --rounds 2 --steps 3

Both train SmolLM2-135M in NF4 with LoRA r 16 on all linear layers, on the same problems in the same
order, with the same G, B, lengths, loss, beta and optimizer settings, in processes of their own
that take turns (A B A B ...). All completions have exactly the same number of tokens (minimum
equals maximum length), so the work is equal. The first step of each process is left out: it warms
caches up. Absolute times on a shared machine mean little; ratios within one call do.

TRL runs in its best CPU settings: bf16 compute where the CPU has it, no gradient checkpointing, one
micro-batch.

Peak memory is the process's resident memory, sampled every 20 ms, above what it was when the model
had been loaded. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# problems a step, completions each, prompt words of filler, new tokens, share of groups without
# signal
WORKLOADS = {
    "short": {"problems": 4, "group": 8, "filler": 0, "new_tokens": 24, "flat": False},
    "long_prompt": {"problems": 2, "group": 8, "filler": 545, "new_tokens": 32, "flat": False},
    "long_completion": {"problems": 2, "group": 8, "filler": 0, "new_tokens": 256, "flat": False},
    "sparse": {"problems": 4, "group": 8, "filler": 0, "new_tokens": 24, "flat": True},
}
SHARED = {"learning_rate": 2e-5, "beta": 0.04, "epsilon": 0.2, "seed": 0}


def problems(work: dict, steps: int) -> list[dict]:
    """As many distinct problems as the steps take, with prompts of about the same length."""
    filler = "word " * work["filler"]
    return [
        {
            "prompt": f"{filler}What is {i // 10 % 10} + {i % 10}? Answer with the number only.",
            "answer": str(i // 10 % 10 + i % 10),
            "flat": i % 2 == 1 and work["flat"],
        }
        for i in range(steps * work["problems"])
    ]


def reward(completions, flat, **_):
    """Something that differs between completions; the same for all of a flat problem's."""
    return [0.0 if f else float(len(c) % 7) for c, f in zip(completions, flat, strict=True)]


class PeakMemory:
    """The highest resident memory since `start`, above what it was then."""

    started = False

    def start(self) -> None:
        import psutil

        self.started = True
        self._process = psutil.Process()
        self._base = self._peak = self._process.memory_info().rss
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.02)

    @property
    def above(self) -> int:
        return self._peak - self._base


def run_ours(work: dict, steps: int, beta: float) -> dict:
    """One process of ours: the product's own loop."""
    from lowmem_grpo.config import load_config
    from lowmem_grpo.profiles import load_profile
    from lowmem_grpo.run.console import Console
    from lowmem_grpo.run.directory import read_lines
    from lowmem_grpo.train import train

    peak = PeakMemory()

    class Watching(Console):
        def progress(self, name, total):
            if name == "rollout" and not peak.started:  # the model is loaded, the first step begins
                peak.start()
            return super().progress(name, total)

    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        # Every problem is there twice: the product holds some out, the benchmark trains on the
        # first ones.
        rows.write_text("".join(json.dumps(p) + "\n" for p in problems(work, steps)))
        held_out = Path(scratch) / "eval.jsonl"
        held_out.write_text(json.dumps({"prompt": "-", "answer": "-", "flat": False}) + "\n")
        settings = {
            "model": {"device": "cpu"},
            "task": {"name": f"records:{rows}", "eval_path": str(held_out)},
            "rewards": {"functions": [f"{Path(__file__).resolve()}:reward"]},
            "rollout": {
                "num_generations": work["group"],
                "problems_per_step": work["problems"],
                "max_prompt_length": 2048,
                "min_completion_length": work["new_tokens"],
                "max_completion_length": work["new_tokens"],
            },
            "grpo": {"beta": beta, "epsilon": SHARED["epsilon"]},
            "optimizer": {"learning_rate": SHARED["learning_rate"]},
            "run": {"steps": steps, "seed": 0, "output": f"{scratch}/run", "save_every": 0},
        }
        profile = load_profile("cpu")
        config = load_config(
            None,
            profile=(f"profile {profile.name}", profile.settings),
            assignments=[("benchmark", settings)],
        )
        train(config, resume=False, overwrite=False, console=Watching(quiet=True))
        records = list(read_lines(Path(scratch) / "run/metrics.jsonl"))[1:]
    phases = {
        name: statistics.median(r["seconds"].get(name, 0.0) for r in records)
        for name in ("rollout", "reward", "reference", "update")
    }
    return {
        "seconds": [r["seconds"]["total"] for r in records],
        "phases": phases,
        "tokens_generated": records[-1]["tokens_generated"],
        "tokens_trunk": records[-1]["tokens_trunk"],
        "peak_bytes": peak.above,
    }


def run_trl(work: dict, steps: int, beta: float) -> dict:
    """One process of TRL's GRPOTrainer."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        TrainerCallback,
    )
    from trl import GRPOConfig, GRPOTrainer

    from lowmem_grpo.hardware import choose_compute_dtype, detect
    from lowmem_grpo.policy.source import resolve

    dtype = getattr(torch, choose_compute_dtype(detect("cpu")).value)
    source = resolve("smollm2-135m")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = [
        {**p, "prompt": [{"role": "user", "content": p["prompt"]}]} for p in problems(work, steps)
    ]

    class Watch(TrainerCallback):
        def __init__(self):
            self.seconds, self.begun, self.ended = [], 0.0, 0.0

        def on_train_begin(self, *_, **__):
            self.ended = time.perf_counter()

        def on_step_end(self, *_, **__):
            # From one step's end to the next: sampling happens before TRL's "step begin".
            now = time.perf_counter()
            self.seconds.append(now - self.ended)
            self.ended = now

    watch, peak = Watch(), PeakMemory()
    with tempfile.TemporaryDirectory() as scratch:
        rows_per_step = work["problems"] * work["group"]
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=lambda completions, flat, **_: reward(
                [c[0]["content"] for c in completions], flat
            ),
            train_dataset=Dataset.from_list(rows),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[watch],
            args=GRPOConfig(
                output_dir=scratch,
                per_device_train_batch_size=rows_per_step,
                gradient_accumulation_steps=1,
                steps_per_generation=1,
                num_generations=work["group"],
                max_completion_length=work["new_tokens"],
                generation_kwargs={"min_new_tokens": work["new_tokens"]},
                temperature=1.0,
                beta=beta,
                epsilon=SHARED["epsilon"],
                loss_type="grpo",
                use_bias_correction_kl=False,  # the k3 of the paper, as ours
                scale_rewards="group",
                learning_rate=SHARED["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_steps=steps,
                shuffle_dataset=False,
                use_cpu=True,
                bf16=dtype == torch.bfloat16,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=SHARED["seed"],
            ),
        )
        peak.start()
        trainer.train()
    return {
        "seconds": watch.seconds[1:],
        "phases": {},
        "tokens_generated": rows_per_step * work["new_tokens"],
        "peak_bytes": peak.above,
    }


def child(side: str, name: str, steps: int, beta: float) -> None:
    work = WORKLOADS[name]
    result = (run_ours if side == "ours" else run_trl)(work, steps, beta)
    print("RESULT " + json.dumps(result), flush=True)


def measure(side: str, arguments) -> dict:
    command = [sys.executable, __file__, "--child", side, "--workload", arguments.workload]
    command += ["--steps", str(arguments.steps), "--beta", str(arguments.beta)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"the {side} process failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=WORKLOADS, default="short")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps of each process; the first is not counted"
    )
    parser.add_argument("--beta", type=float, default=SHARED["beta"])
    parser.add_argument("--child", choices=["ours", "trl"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be at least 2: the first is not counted")
    if arguments.child:
        child(arguments.child, arguments.workload, arguments.steps, arguments.beta)
        return
    rounds = []
    for number in range(arguments.rounds):
        pair = {side: measure(side, arguments) for side in ("ours", "trl")}
        step = {side: statistics.median(pair[side]["seconds"]) for side in pair}
        memory = {side: pair[side]["peak_bytes"] / 2**30 for side in pair}
        print(
            f"round {number + 1}: ours {step['ours']:.1f} s, {memory['ours']:.2f} GiB; "
            f"TRL {step['trl']:.1f} s, {memory['trl']:.2f} GiB; "
            f"ratio {step['trl'] / step['ours']:.2f} in time, "
            f"{memory['trl'] / memory['ours']:.2f} in memory",
            flush=True,
        )
        rounds.append({"step": step, "memory_gib": memory, "phases": pair["ours"]["phases"]})
    time_ratios = [r["step"]["trl"] / r["step"]["ours"] for r in rounds]
    memory_ratios = [r["memory_gib"]["trl"] / r["memory_gib"]["ours"] for r in rounds]
    print(
        json.dumps(
            {
                "workload": arguments.workload,
                "beta": arguments.beta,
                "time_ratio": statistics.median(time_ratios),
                "time_ratio_spread": [min(time_ratios), max(time_ratios)],
                "memory_ratio": statistics.median(memory_ratios),
                "memory_ratio_spread": [min(memory_ratios), max(memory_ratios)],
                "rounds": rounds,
            }
        )
    )


if __name__ == "__main__":
    main()

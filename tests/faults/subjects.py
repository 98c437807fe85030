"""Which files are damaged, the commands that read them, and what a damaged file still says where it
is taken.

Some files carry checksums, and no change of them may pass. The others are taken rightly where an
independent reading finds what the command needs: there is no checksum in a data set, so another
digit in an answer is another answer.
"""

from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import gguf
import pyarrow.parquet
import torch
from safetensors import safe_open
from tomlkit import parse
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from tests.runs import TINY

__all__ = ["SUBJECTS", "Subject"]

Commands = Callable[[Path, Random], list]
Says = Callable[[Path, object, Path], bool]
LAYERS, HIDDEN, VOCAB = 2, 64, 128  # of tests/tiny.py


@dataclass(frozen=True)
class Subject:
    """A file of the workspace. `commands(root, random)`: one that reads it. `says(file, result,
    root)`: whether it can be taken as it is now, with this result; what it raises is a no. `named`:
    what a refusal may name instead of the file. `writes`: what of the workspace a command may
    change that succeeds.
    """

    file: str
    commands: Commands
    says: Says
    named: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


def _train(root: Path, *arguments) -> list:
    output = ["--output", root / "out/run"]
    return ["train", "--model", root / "model", *output, *TINY, "--steps", "1", *arguments]


def _evaluate(root: Path, target: str, *arguments) -> list:
    short = ["--max-completion-length", "3", "--num-problems", "2", "-q"]
    return ["eval", root / target, *short, *arguments]


def _sample(root: Path, target: str, *arguments) -> list:
    return ["sample", root / target, "1+1=", "--max-completion-length", "3", "-q", *arguments]


def _never(file: Path, result, root: Path) -> bool:
    return False


# --- Settings


def _in_force(file: Path, result, root: Path) -> bool:
    """What the file says, config.toml of the run says too, of the same type."""
    wanted = parse(file.read_bytes().decode()).unwrap()
    found = parse((root / "out/run/config.toml").read_text()).unwrap()
    flags = {x.partition("=")[0].partition(".")[2] for x in TINY if "=" in x}
    flags |= {"num_generations", "problems_per_step", "max_completion_length", "steps"}
    return all(
        (
            found[section].get(key) == value
            and (type(found[section][key]) is type(value) or type(value) is int)
            and type(found[section][key]) is not bool
        )
        or (type(value) is bool and found[section].get(key) is value)
        for section, entries in wanted.items()
        for key, value in entries.items()
        if section != "card" and key not in flags and value != "auto"
    )


def _judges(file: Path, result, root: Path) -> bool:
    """The values are of the types that they were of, and numbers are numbers."""
    found, good = (parse(path.read_text()).unwrap() for path in (file, root / "judge.toml.good"))
    numbers = [value for value in found.values() if not isinstance(value, str)]
    return (
        {"url", "model", "prompt"} <= found.keys() <= good.keys()
        and all(isinstance(found[name], (type(good[name]), int)) for name in found)
        and all(isinstance(found[name], str) == isinstance(good[name], str) for name in found)
        and all(math.isfinite(value) and value >= 0 and value is not True for value in numbers)
    )


def _schemes(file: Path, result, root: Path) -> bool:
    return isinstance(json.loads(file.read_bytes().decode(), object_pairs_hook=_once), dict)


def _reward(kind: str, file: str) -> Commands:
    def commands(root: Path, random: Random) -> list:
        taken = ["--output", root / "taken", "--reward", f"{kind}:{root / file}"]
        return ["train", "--model", root / "model", *TINY, *taken]

    return commands


# --- Data


def _once(pairs: list[tuple]) -> dict:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def _jsonl(file: Path) -> list[dict]:
    lines = file.read_bytes().decode().splitlines()
    return [json.loads(line, object_pairs_hook=_once) for line in lines if line.strip()]


def _csv(file: Path) -> list[dict]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream, strict=True))


def _parquet(file: Path) -> list[dict]:
    return pyarrow.parquet.read_table(file, page_checksum_verification=True).to_pylist()


def _rows(read: Callable[[Path], list[dict]]) -> Says:
    """Every row has a prompt and an answer."""

    def says(file: Path, result, root: Path) -> bool:
        return all(_said(row["prompt"]) and _said(row["answer"]) for row in read(file))

    return says


def _said(value) -> bool:
    infinite = isinstance(value, float) and not math.isfinite(value)
    return value not in (None, [], "") and not infinite


def _records(file: str) -> Commands:
    return lambda root, random: _train(root, "--task", f"records:{root / file}")


# --- Models


def _model(root: Path, random: Random) -> list:
    plain = ["--profile", "cpu"]
    evaluate = _evaluate(root, "model", "--task", "arithmetic:digits=1", *plain)
    return random.choice([_train(root), evaluate, _sample(root, "model", *plain)])


def _loads(file: Path, result, root: Path) -> bool:
    """Plain transformers loads the directory, all of it, and computes numbers."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (file.parent / name).exists():
            json.loads((file.parent / name).read_bytes().decode(), object_pairs_hook=_once)
    tokenizer = AutoTokenizer.from_pretrained(file.parent)
    question = [{"role": "user", "content": "1+1="}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    assert "1+1=" in text
    logging.disable_progress_bar()
    model, info = AutoModelForCausalLM.from_pretrained(file.parent, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return bool(model(torch.tensor([tokenizer(text).input_ids])).logits.isfinite().all())


def _tensors(file: Path, result, root: Path) -> bool:
    """Every weight is there, and a number."""
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        good = all(weights.get_tensor(name).isfinite().all() for name in names)
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
    return good and embedding == [VOCAB, HIDDEN] and len(names) == 9 * LAYERS + 2


def _gguf_tensors(file: Path, result, root: Path) -> bool:
    tensors = gguf.GGUFReader(file).tensors
    return all(torch.from_numpy(t.data.copy()).isfinite().all() for t in tensors)


def _template(root: Path, random: Random) -> list:
    return _train(root, "--set", f"model.chat_template={root / 'template.jinja'}")


def _renders(file: Path, result, root: Path) -> bool:
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    tokenizer.chat_template = file.read_bytes().decode()
    question = [{"role": "user", "content": "What is 7?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    return "What is 7?" in text


# --- Reports


def _memory(of: str) -> Commands:
    return lambda root, random: ["memory", "report", root / of, "--output", root / "out/report"]


def _snapshot(root: Path, random: Random) -> list:
    replay = ["memory", "replay", root / "snapshot.pickle"]
    return random.choice([replay, _memory("snapshot.pickle")(root, random)])


def _replays(file: Path, result, root: Path) -> bool:
    """Python reads it: a snapshot, of whatever numbers; what lies behind its end no reader sees."""
    return {"segments", "device_traces"} <= pickle.loads(file.read_bytes()).keys()


def _document(file: Path, result, root: Path) -> bool:
    """Gone, and the report is of the rest; or JSON, with every name once."""
    if file.exists() or file.is_symlink():
        json.loads(file.read_bytes().decode(), object_pairs_hook=_once)
    return True


def _compared(file: Path, result, root: Path) -> bool:
    """The same; or a run that went on, and said that nothing was added to the file."""
    said = f"not compared, DamageError: cannot read {file}" in result.stderr
    return said or _document(file, result, root)


def _lines(file: Path, result, root: Path) -> bool:
    """Gone, or lines of JSON, of which the last may be cut off."""
    if file.exists() or file.is_symlink():
        *lines, _ = file.read_bytes().split(b"\n")
        assert all(json.loads(line.decode(), object_pairs_hook=_once) for line in lines)
    return True


# --- Pools and runs


def _pool(root: Path, random: Random) -> list:
    more = ["--groups", "6", "--output", root / "pool"]
    rollouts = ["rollouts", "--model", root / "model", *TINY, *more]
    return random.choice([_train(root, "--pool", root / "pool", *BASE), rollouts])


BASE = ["--set", "grpo.old_policy=base"]


def _begun(file: Path, result, root: Path) -> bool:
    """A pool that is whole, or was made whole: but for a line that was cut off at its end."""
    return file.read_bytes().count(b"\n") in (4, 6)


def _resume(root: Path, random: Random) -> list:
    return ["train", "--output", root / "run", "--resume", "--steps", "3", "-q"]


def _taken(*arguments: str) -> Commands:
    """Commands that take a run's adapter."""

    def commands(root: Path, random: Random) -> list:
        export = ["export", root / "run", "--output", root / "out/export"]
        merged = [*export, "--format", "merged"]
        ways = [_evaluate(root, "run"), _sample(root, "run"), export, merged]
        return [*random.choice(ways), *arguments]

    return commands


def _any(*of: Commands) -> Commands:
    return lambda root, random: random.choice(of)(root, random)


def _same_settings(file: Path, result, root: Path) -> bool:
    """The same settings, or a file that does not claim any more to be what was written."""
    text = file.read_bytes().decode()
    good = parse((root / "run/config.toml.good").read_text()).unwrap()
    return not text.startswith("# sha256 of the lines below: ") or parse(text).unwrap() == good


def _passed_over(file: Path, result, root: Path) -> bool:
    """The checkpoint was not used, and is named."""
    return f"not used: {file.parent}" in result.stderr.replace("\n", "")


_IN_MODEL = ("model/tokenizer.json", "model/tokenizer_config.json", "model/chat_template.jinja")
_SWAPPED = ("metrics.jsonl, step",)
_NO_RUN = ("run/config.json", "run is not a run directory", "run holds no run")
_CHECKPOINT = "run/checkpoints/step-000002"
_CHECKPOINTED = ("state.json", "adapter_model.safetensors", "optimizer.safetensors")
SUBJECTS = [
    Subject(
        "run.toml",
        lambda root, random: [*_train(root)[:1], root / "run.toml", *_train(root)[1:]],
        _in_force,
        named=("run.toml", "Invalid value"),
    ),
    Subject(
        "profile.toml",
        lambda root, random: [root / "profile.toml" if x == "cpu" else x for x in _train(root)],
        _in_force,
        named=("profile profile",),
    ),
    Subject("judge.toml", _reward("judge", "judge.toml"), _judges),
    Subject("schema.json", _reward("json", "schema.json"), _schemes),
    Subject("template.jinja", _template, _renders, named=("chat template",)),
    Subject("data.jsonl", _records("data.jsonl"), _rows(_jsonl)),
    Subject("data.csv", _records("data.csv"), _rows(_csv)),
    Subject("data.parquet", _records("data.parquet"), _rows(_parquet)),
    *(
        Subject(name, _model, _loads, named=("/model", "chat template"))
        for name in ("model/config.json", "model/generation_config.json", *_IN_MODEL)
    ),
    Subject("model/model.safetensors", _model, _tensors, named=("/model",)),
    Subject(
        "tiny.gguf",
        lambda root, random: _sample(root, "tiny.gguf", "--profile", "cpu"),
        _gguf_tensors,
    ),
    Subject("snapshot.pickle", _snapshot, _replays),
    Subject("plan.json", _memory("plan.json"), _document),
    Subject("run/plan.json", _memory("run"), _document),
    Subject(
        "run/memory.json", _any(_memory("run"), _resume), _compared, ("run/plan.json",), ("run/",)
    ),
    Subject("run/metrics.jsonl", _any(_memory("run"), _resume), _lines, _SWAPPED, ("run/",)),
    Subject("run/rollouts.jsonl", _resume, _lines, _SWAPPED, ("run/",)),
    Subject("run/eval.jsonl", _resume, _lines, _SWAPPED, ("run/",)),
    Subject(
        "run/config.toml",
        _any(_resume, _taken()),
        _same_settings,
        named=_NO_RUN,
        writes=("run/",),
    ),
    Subject("pool/pool.json", _pool, _never, named=("/pool",), writes=("pool/",)),
    Subject("pool/groups.jsonl", _pool, _begun, named=("/pool",), writes=("pool/",)),
    *(
        Subject(f"run/adapter/{name}", _taken(), _never, named=("run/adapter",))
        for name in ("adapter_model.safetensors", "adapter_config.json", "checksums.json")
    ),
    *(
        Subject(f"run/best/{name}", _taken("--best"), _never, named=("run/best", "best adapter"))
        for name in ("adapter_model.safetensors", "adapter_config.json", "best.json")
    ),
    *(
        Subject(
            f"{_CHECKPOINT}/{name}",
            _any(_resume, _taken()),
            _passed_over,
            named=(_CHECKPOINT, "run/checkpoints"),
            writes=("run/",),
        )
        for name in _CHECKPOINTED
    ),
]

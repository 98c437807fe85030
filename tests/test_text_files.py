"""Text files of any encoding and line end: read as the same text, or named."""

import pytest

from lowmem_grpo.config import load_config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.rewards.judge import _read as read_judge
from lowmem_grpo.text_files import half_character, read_text

TOML = '[run]\nsteps = 3\n[task]\nsystem_prompt = """Über\u2028all\nso."""\n'


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_run_file_may_have_a_mark_and_any_line_end(tmp_path, encoding, ends):
    path = tmp_path / "run.toml"
    path.write_bytes(TOML.replace("\n", ends).encode(encoding))
    config = load_config(str(path), profile=None, assignments=[])
    assert config.run.steps == 3
    assert config.task.system_prompt == "Über\u2028all\nso."
    assert read_text(path) == TOML


def test_a_judge_s_file_may_have_a_mark(tmp_path):
    path = tmp_path / "judge.toml"
    path.write_text(
        'url = "http://localhost"\nmodel = "m"\nprompt = "{completion}"\n', encoding="utf-8-sig"
    )
    assert read_judge(str(path)).model == "m"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_another_encoding_is_named_with_the_way_out(tmp_path, encoding):
    path = tmp_path / "run.toml"
    path.write_bytes(TOML.replace("\u2028", " ").encode(encoding))
    wanted = {"utf-32": "UTF-32", "latin-1": "byte 42 is 0xdc"}.get(encoding, "UTF-16")
    with pytest.raises(ConfigError, match=f"{wanted}.*save it as UTF-8"):
        load_config(str(path), profile=None, assignments=[])


def test_half_a_character_is_found():
    assert half_character("a \ud83d b") == "\\ud83d"
    assert half_character("a \U0001f600 b") is None

"""Damaged files of every kind, given to the commands that read them.

None crashes, none passes for what it is not, none costs anything that was sound.
"""

import os
import re
import shutil
from collections import Counter
from contextlib import contextmanager
from random import Random
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowmem_grpo.config import Config
from tests.faults.corruption import corruptions, snapshot
from tests.faults.subjects import SUBJECTS
from tests.faults.workspace import build
from tests.runs import call

EXIT_CODES = (0, 1, 2, 3)
LONGEST = 500  # characters of a message
SETTING = re.compile(rf"\b({'|'.join(Config.model_fields)})\.\w+ = ")
LOCKS = ("run/run.lock", "taken/run.lock")
ALWAYS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_BY_FILE = {subject.file: subject for subject in SUBJECTS}


@contextmanager
def restored(base, whole):
    """A function that puts a workspace back as it was, and gives its root."""
    root, sound = base / "work", base / "sound"
    with mock.patch.dict(os.environ, {"LOWMEM_GRPO_CACHE": str(base / "cache")}):
        build(root, whole)
        for name in ("judge.toml", "run/config.toml"):
            shutil.copyfile(root / name, root / f"{name}.good")
        root.rename(sound)

        def fresh():
            shutil.rmtree(root, ignore_errors=True)
            return shutil.copytree(sound, root)

        yield fresh


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    with restored(tmp_path_factory.mktemp("faults"), whole=True) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def counted(request):
    """Outcomes by file and by corruption; printed at the end."""
    outcomes = Counter()
    yield outcomes
    if not outcomes:
        return
    lines = []
    kinds = ("refused", "taken as it says", "another was used")
    for which, title in ((0, "file"), (1, "corruption")):
        lines.append(f"\n| {title} | inputs | {' | '.join(kinds)} |\n|---|---|---|---|---|")
        rows = dict.fromkeys(key[which] for key in outcomes)
        for row in [*rows, None]:
            of_row = {key: n for key, n in outcomes.items() if row in (key[which], None)}
            cells = [sum(n for key, n in of_row.items() if key[2] == kind) for kind in kinds]
            lines.append(f"| {row or 'all'} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


def outcome(subject, corruption: str, seed: int, root) -> str:
    """Damage the file, run the command, and judge what became of it."""
    file, random = root / subject.file, Random(f"{subject.file} {corruption} {seed}")
    sound = snapshot(root)
    corruptions(file)[corruption](file, random)
    command = subject.commands(root, random)
    before = snapshot(root)
    result = call(*command)
    after = snapshot(root)
    told = " ".join(map(str, command)), result.exit_code, result.stderr, result.stdout[-300:]
    assert result.exception is None or isinstance(result.exception, SystemExit), told
    assert result.exit_code in EXIT_CODES, told
    assert "Traceback" not in result.stderr, told
    assert "--debug" not in result.stderr, told
    allowed = ("out", *LOCKS, *(subject.writes if result.exit_code == 0 else ()))
    for name in before.keys() | after.keys():
        if not name.startswith(allowed):
            assert before.get(name) == after.get(name), (name, told)
    # The directory that is taken is refused after what is read has been found good.
    if result.exit_code == 0 or f"{root / 'taken'} exists" in result.stderr:
        try:
            # Zeros in the place of zeros are no damage.
            said = before == sound or subject.says(file, result, root)
        except Exception as error:  # an independent reader has no narrower way to say no
            said, told = False, (error, *told)
        assert said, ("accepted silently", told)
        return "another was used" if "not used: " in result.stderr else "taken as it says"
    if command[:2] == ["memory", "replay"] and result.exit_code == 1 and not result.stderr:
        return "refused"  # replayed, and found to differ, in the table that it prints
    messages = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(messages) == 1, told
    assert len(messages[0]) <= LONGEST + len(str(root)), told
    named = (str(file), *subject.named)
    assert SETTING.search(messages[0]) or any(name in messages[0] for name in named), told
    return "refused"


def test_a_few_corruptions_of_most_files(tmp_path):
    with restored(tmp_path, whole=False) as fresh:
        there = [subject for subject in SUBJECTS if (fresh() / subject.file).exists()]
        assert len(there) > 20
        for subject in there:
            kinds = sorted(corruptions(fresh() / subject.file))
            outcome(subject, Random(subject.file).choice(kinds), 0, fresh())


@pytest.mark.slow
@pytest.mark.parametrize("file", _BY_FILE)
def test_every_corruption_of_every_file(workspace, counted, file):
    subject = _BY_FILE[file]
    for corruption in corruptions(workspace() / file):

        @settings(ALWAYS, max_examples=2)
        @given(st.just(corruption), st.integers(0, 2**32 - 1))
        def refused_or_right(corruption, seed):
            found = outcome(subject, corruption, seed, workspace())
            counted[file, corruption, found] += 1

        refused_or_right()

"""Damaged files of every kind, given to the commands that read them.

None crashes, none passes for what it is not, none costs anything that was sound.
"""

import os
import shutil
from collections import Counter
from random import Random
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.corruption import corruptions, snapshot
from tests.faults.subjects import SUBJECTS
from tests.faults.workspace import build
from tests.runs import call

EXIT_CODES = (0, 1, 2, 3)
LONGEST = 500  # characters of a message
LOCKS = ("run/run.lock", "taken/run.lock")
ALWAYS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_BY_FILE = {subject.file: subject for subject in SUBJECTS}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A function that puts the workspace back as it was, and gives its root."""
    base = tmp_path_factory.mktemp("faults")
    root, sound = base / "work", base / "sound"
    with mock.patch.dict(os.environ, {"LOWMEM_GRPO_CACHE": str(base / "cache")}):
        build(root)
        for name in ("snapshot.pickle", "run/config.toml"):
            shutil.copyfile(root / name, root / f"{name}.good")
        root.rename(sound)

        def fresh():
            shutil.rmtree(root, ignore_errors=True)
            return shutil.copytree(sound, root)

        yield fresh


@pytest.fixture(scope="module")
def counted(request):
    """Outcomes by file and by corruption; printed at the end."""
    outcomes = Counter()
    yield outcomes
    report = request.config.pluginmanager.get_plugin("terminalreporter")
    if report is None or not outcomes:
        return
    kinds = ("refused", "taken as it says", "another was used")
    for which, title in ((0, "file"), (1, "corruption")):
        report.write_line(f"\n| {title} | inputs | {' | '.join(kinds)} |\n|---|---|---|---|---|")
        rows = dict.fromkeys(key[which] for key in outcomes)
        for row in [*rows, None]:
            cells = [
                sum(
                    n for key, n in outcomes.items() if row in (key[which], None) and key[2] == kind
                )
                for kind in kinds
            ]
            report.write_line(f"| {row or 'all'} | {sum(cells)} | {' | '.join(map(str, cells))} |")


def outcome(subject, corruption: str, seed: int, root) -> str:
    """Damage the file, run the command, and judge what became of it."""
    file, random = root / subject.file, Random(f"{subject.file} {corruption} {seed}")
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
    if result.exit_code == 0 or (corruption and _read_and_found_good(subject, result, root)):
        try:
            said = subject.says(file, result, root)
        except Exception as error:  # an independent reader has no narrower way to say no
            said, told = False, (error, *told)
        assert said, ("accepted silently", told)
        return "another was used" if "not used: " in result.stderr else "taken as it says"
    messages = [line for line in result.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(messages) == 1, told
    assert len(messages[0]) <= LONGEST + len(str(root)), told
    named = (str(file), *subject.named)
    setting = any(f"{section}." in messages[0] for section in ("task", "rewards", "run", "lora"))
    assert setting or any(name in messages[0] for name in named), told
    return "refused"


def _read_and_found_good(subject, result, root) -> bool:
    return f"{root / 'taken'} exists" in result.stderr


SHORT = [
    (subject.file, kind)
    for place, subject in enumerate(SUBJECTS)
    for kind in [("cut off", "one bit flipped", "another type", "gone", "a directory")[place % 5]]
]


@pytest.mark.parametrize("place", range(0, len(SUBJECTS), 5))
def test_one_input_of_each_file(workspace, counted, place):
    for subject in SUBJECTS[place : place + 5]:
        root = workspace()
        kinds = sorted(corruptions(root / subject.file))
        outcome(subject, Random(subject.file).choice(kinds), 0, root)


@pytest.mark.slow
@pytest.mark.parametrize("file", _BY_FILE)
def test_every_corruption_of_every_file(workspace, counted, file):
    subject = _BY_FILE[file]
    for corruption in corruptions(workspace() / file):

        @ALWAYS
        @settings(max_examples=2)
        @given(seed=st.integers(0, 2**32 - 1))
        def refused_or_right(seed, corruption=corruption):
            found = outcome(subject, corruption, seed, workspace())
            counted[file, corruption, found] += 1

        refused_or_right()

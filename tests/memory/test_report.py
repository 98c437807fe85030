"""Pages and pictures of plans, measurements, runs and snapshots, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from lowmem_grpo.errors import ConfigError
from lowmem_grpo.memory.allocator import MIB, CachingAllocator, Event
from lowmem_grpo.memory.page import amount, comparison_table
from lowmem_grpo.memory.report import ReportError, write_report
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.timeline import timeline
from tests.runs import call

GIB = 1024**3
PNG = b"\x89PNG\r\n"
HOSTILE = "<script>alert('x')</script>&\"'$\\frac{$ ]]> --> \x00"
VOID = {"meta", "link", "br", "img"}


class Page(HTMLParser):
    """Reads a page: every tag is closed, by its own end. Keeps tags, attributes and text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def a_page(path) -> Page:
    """The page, whole and without anything from elsewhere."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert not {"src", "srcset", "data"} & {name for name, _ in page.attributes}
    links = [value for name, value in page.attributes if name in ("href", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    assert "url(http" not in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links} <= set(ids)
    return page


def a_timeline(phases=("load", "rollout", "update")) -> dict:
    events = []
    for number, phase in enumerate(phases):
        weights = Event("alloc", 1000 + number, 40 * MIB, 0, phase, "", "base_weights")
        events.append(weights)
        for place in range(30):
            made = Event("alloc", place, (place + 1) * MIB, 0, phase, "", "activations")
            events += [made, made._replace(action="free")]
    return timeline(events, *simulate(events).timeline)


def a_phase(name="rollout", allocated=3 * GIB, **components) -> dict:
    components = {"base_weights": allocated - 5 * MIB, "logits": 5 * MIB, **components}
    return {
        "name": name,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": allocated + 100 * MIB,
        "components": components,
    }


def a_plan(**change) -> dict:
    return {
        "model": "a/model",
        "profile": "rtx-4090-24gb",
        "card": {"name": "A card", "memory_bytes": 24 * GIB},
        "fits": True,
        "settings": {"lora.r": 16, "lora.target_modules": ["q_proj", "v_proj"]},
        "reasons": {"lora.r": "default", "method": "traced and simulated"},
        "context_bytes": [300 * MIB, 600 * MIB],
        "phases": [a_phase("load", GIB), a_phase(), a_phase("update", 2 * GIB)],
        "peak_reserved_bytes": 3 * GIB + 100 * MIB,
        "headroom_bytes": 20 * GIB,
        "host_bytes": 480 * MIB,
        "method": "trace",
        **change,
    }


def a_comparison(phase="rollout", reserved=True, part=0.07) -> dict:
    predicted = 3 * GIB
    row = {"phase": phase}
    for kind, known in (("allocated", True), ("reserved", reserved)):
        row[f"predicted_{kind}_bytes"] = predicted
        row[f"measured_{kind}_bytes"] = int(predicted * (1 + part)) if known else None
        row[f"{kind}_deviation"] = part if known else None
    return row


def a_profile(reserved=True) -> dict:
    measured = a_phase(allocated=3 * GIB + 1)
    if not reserved:
        measured["peak_reserved_bytes"] = None
    return {
        "plan": a_plan(timeline=a_timeline()),
        "measured": {
            "device": "NVIDIA test",
            "how": "Counters were read after each phase.",
            "phases": [measured],
            "timeline": None,
            "snapshot": None,
        },
        "comparison": [a_comparison(reserved=reserved), a_comparison("update", reserved, -0.01)],
    }


def a_record(step: int, cuda: bool) -> dict:
    sizes = {"host_rss": GIB + step}
    if cuda:
        sizes |= {"allocated": 2 * GIB, "reserved": 3 * GIB}
    return {"step": step, "loss": 0.1, "memory": {"rollout": sizes, "update": sizes}}


def written(path, document):
    path.write_text(json.dumps(document))
    return path


def reported(target, *arguments) -> tuple[Page, set[str]]:
    """The page of `memory report`, and the names of the files beside it."""
    result = call("memory", "report", target, *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    page = type(target)(answer["page"])
    files = {path.name for path in page.parent.iterdir()}
    assert files == {"index.html", *(type(target)(p).name for p in answer["pictures"])}
    for name in files:
        data = (page.parent / name).read_bytes()
        if name.endswith(".png"):
            assert data.startswith(PNG)
        elif name.endswith(".svg"):
            assert ElementTree.fromstring(data).tag == "{http://www.w3.org/2000/svg}svg"
    return a_page(page), files


def pictures(*names):
    return {"index.html", *(f"{name}.{kind}" for name in names for kind in ("png", "svg"))}


def test_a_plan(tmp_path):
    file = written(tmp_path / "plan.json", a_plan(timeline=a_timeline()))
    page, files = reported(file)
    assert files == pictures("timeline")
    assert (tmp_path / "plan-report" / "index.html").is_file()
    assert page.tags.count("svg") == 1
    for text in (
        "Memory of a/model on A card",
        "Fits: 20.00 GiB are left",
        "device use at the peak 3.39 GiB to 3.68 GiB",
        "traced and simulated",
        '["q_proj", "v_proj"]',
        "base_weights 3.00 GiB , logits 5.0 MiB",
    ):
        assert text in page.text
    assert ("title", f"{3 * GIB:,} bytes") in page.attributes


def test_a_plan_without_a_timeline_that_does_not_fit(tmp_path):
    file = written(tmp_path / "plan.json", a_plan(fits=False, headroom_bytes=-5 * MIB))
    page, files = reported(file, "--output", tmp_path / "there" / "deep")
    assert files == pictures()
    assert "Does not fit: 5.0 MiB are missing" in page.text
    assert (tmp_path / "there" / "deep" / "index.html").is_file()


def test_a_measurement(tmp_path):
    page, files = reported(written(tmp_path / "profile.json", a_profile()))
    assert files == pictures("timeline", "compared")
    assert "\N{BLACK UP-POINTING TRIANGLE} +7.0%" in page.text
    assert "reserved: predicted" in page.text
    assert "-1.0%" in page.text
    assert page.attributes.count(("class", "number off")) == 2
    assert "NVIDIA test: Counters were read" in page.text


def test_a_measurement_on_a_cpu_with_a_timeline(tmp_path):
    document = a_profile(reserved=False)
    document["measured"]["timeline"] = {**a_timeline(("rollout", "")), "reserved": None}
    page, _ = reported(written(tmp_path / "profile.json", document))
    assert "reserved: predicted" not in page.text


def test_a_deviation_is_marked_above_five_percent():
    marked = [
        "off" in comparison_table([a_comparison(reserved=False, part=part)])
        for part in (0.05, 0.0501, -0.05, -0.0501, 0.0)
    ]
    assert marked == [False, True, False, True, False]


@pytest.mark.parametrize("cuda", [True, False])
def test_a_run(tmp_path, cuda):
    run = tmp_path / "run"
    run.mkdir()
    lines = [json.dumps(a_record(step, cuda)) + "\n" for step in range(1, 4)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"step": 4, "mem')
    _, files = reported(run)
    assert files == pictures("steps")
    written(run / "plan.json", a_plan(timeline=a_timeline()))
    measured = {key: a_profile()["measured"][key] for key in ("device", "how", "phases")}
    moments = [
        {"step": 1, "when": "first step", "comparison": [a_comparison()], "measured": measured},
        {"step": 3, "when": "at the end", "comparison": [a_comparison("update", part=0.01)]},
    ]
    written(run / "memory.json", moments)
    page, files = reported(run)
    assert files == pictures("timeline", "compared", "steps")
    assert page.tags.count("svg") == 3
    assert "first step (step 1)" in page.text
    assert "at the end (step 3)" in page.text
    assert "Memory of a/model on A card: run run" in page.text


def a_snapshot(device: int = 0) -> dict:
    """What torch would have recorded of the simulated allocator: two blocks, one of them freed."""
    allocator, trace = CachingAllocator(), []
    for size in (30 * MIB, 700):
        before = set(allocator.segments)
        block = allocator.malloc(size, 0)
        for address in set(allocator.segments) - before:
            length = allocator.segments[address]
            trace.append({"action": "segment_alloc", "addr": address, "size": length, "stream": 0})
        trace.append({"action": "alloc", "addr": block.address, "size": size, "stream": 0})
    for action in ("free_requested", "free_completed"):
        trace.append({"action": action, "addr": block.address, "size": size, "stream": 0})
    allocator.free(block)
    big, small = allocator.segments.items()
    segments = [
        {
            "device": device, "address": address, "total_size": size, "stream": 0,
            "blocks": [{"size": size, "state": state}],
        }
        for (address, size), state in ((big, "active_allocated"), (small, "inactive"))
    ]  # fmt: skip
    return {"segments": segments, "device_traces": [[]] * device + [trace]}


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_snapshot(tmp_path, protocol):
    file = tmp_path / "run.pickle"
    file.write_bytes(pickle.dumps(a_snapshot(), protocol))
    page, files = reported(file)
    assert files == pictures("timeline")
    assert "addresses exact 2 of 2" in page.text
    assert "reserved at the end 32.0 MiB , as recorded" in page.text


def test_a_snapshot_by_its_first_byte_and_of_a_device(tmp_path):
    snapshot = a_snapshot(device=1)
    snapshot["device_traces"][0] = [{"action": "snapshot"}]
    file = tmp_path / "unnamed"
    file.write_bytes(pickle.dumps(snapshot))
    result = call("memory", "report", file)
    assert result.exit_code == 2
    assert "devices with a trace are [0, 1]" in result.stderr
    page, _ = reported(file, "--device", "1")
    assert "device 1" in page.text


def test_it_prints_the_page(tmp_path):
    result = call("memory", "report", written(tmp_path / "plan.json", a_plan()))
    assert result.stdout == f"{tmp_path / 'plan-report' / 'index.html'}\n"


def test_hostile_names_stay_text(tmp_path):
    phases = [a_phase(HOSTILE, **{HOSTILE: 7 * MIB})]
    lines = a_timeline(("load", HOSTILE))
    lines["components"][HOSTILE] = lines["components"].pop("activations")
    document = {
        "plan": a_plan(
            model=HOSTILE, profile=HOSTILE, card={"name": HOSTILE, "memory_bytes": GIB},
            settings={HOSTILE: HOSTILE}, reasons={HOSTILE: HOSTILE, f"{HOSTILE}2": HOSTILE},
            phases=phases, timeline=lines,
        ),
        "measured": {
            "device": HOSTILE, "how": HOSTILE, "phases": phases, "timeline": lines,
            "snapshot": HOSTILE,
        },
        "comparison": [a_comparison(HOSTILE)],
    }  # fmt: skip
    run = tmp_path / "<b>run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "memory": {HOSTILE: {"host_rss": GIB, HOSTILE: 1}}}) + "\n"
    )
    written(run / "plan.json", document["plan"])
    moment = {"step": 1, "when": HOSTILE, **{k: document[k] for k in ("comparison", "measured")}}
    written(run / "memory.json", [moment])
    profile = written(tmp_path / "profile.json", document)
    for target, many in ((profile, 2), (run, 3)):
        page, _ = reported(target)
        assert page.text.count("<script>alert('x')</script>&\"'$\\frac{$ ]]> -->") >= 8
        assert page.tags.count("svg") == many
        assert not {"b", "script"} & set(page.tags)
        assert "\x00" not in page.text


def refused(target, *arguments) -> str:
    result = call("memory", "report", target, *arguments)
    assert result.exit_code == 2, (result.exit_code, result.stderr)
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert str(target) in result.stderr
    assert "give" in result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("plan.json", b"{", "not JSON"),
        ("plan.json", b"", "not JSON"),
        ("plan.json", b"\xff\xfe{", "not JSON"),
        ("plan.json", b"[" * 100_000, "not JSON"),
        ("plan.json", b'{"model": "a", "model": "b"}', "the name 'model' comes twice"),
        ("plan.json", b'{"model": "\xed\xa0\x80"}', "byte 11 is 0xed"),
        ("plan.json", b'{"model": "\\ud800"}', "half of a surrogate pair"),
        ("plan.json", b"[1, 2]", "the whole"),
        ("plan.json", b'{"phases": []}', "model: Field required"),
        ("plan.json", json.dumps(a_plan(phases=[])).encode(), "phases"),
        ("plan.json", json.dumps(a_plan(host_bytes=-1)).encode(), "host_bytes"),
        ("plan.json", json.dumps(a_plan(host_bytes=10**400)).encode(), "host_bytes"),
        ("plan.json", json.dumps(a_plan(phases=[{"name": 1}])).encode(), "phases.0.name"),
        ("plan.json", json.dumps(a_plan(timeline={"phase": []})).encode(), "timeline"),
        (
            "plan.json",
            json.dumps(a_plan(timeline={"phase": ["load"], "allocated": [1, 2]})).encode(),
            "lists of other lengths than 1",
        ),
        ("profile.json", json.dumps({**a_profile(), "measured": 3}).encode(), "measured"),
        ("profile.json", b'{"measured": {}, "comparison": [NaN]}', "plan: Field required"),
        ("run.pickle", b"", "not a memory snapshot"),
        ("run.pickle", pickle.dumps({"a": 1}), "device_traces"),
        ("run.json", pickle.dumps(a_snapshot())[:50], "not a memory snapshot"),
    ],
)
def test_what_is_not_a_report_is_named(tmp_path, name, data, message):
    file = tmp_path / name
    file.write_bytes(data)
    assert message in refused(file)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_no_file_no_run(tmp_path):
    assert "No such file" in refused(tmp_path / "nowhere.json")
    assert "neither plan.json" in refused(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "neither plan.json" in refused(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": "one"}\n')
    assert "metrics.jsonl: 0.step" in refused(tmp_path)
    (tmp_path / "memory.json").write_text("{}")
    assert "memory.json: the whole" in refused(tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    file = written(tmp_path / "plan.json", a_plan())
    with pytest.raises(ReportError, match="name another directory with --output"):
        write_report(file, file)


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = written(tmp_path / "plan.json", a_plan(timeline=a_timeline()))
    with pytest.raises(ConfigError, match=r"pip install 'lowmem-grpo\[report\]'"):
        write_report(file)
    assert not (tmp_path / "plan-report").exists()
    assert call("memory", "report", file).exit_code == 2
    # Tables need no matplotlib.
    write_report(written(tmp_path / "tables.json", a_plan()))


def test_amounts():
    sizes = 0, 2048, MIB, 812 * MIB + MIB // 2, 17 * GIB, -3 * GIB
    assert [amount(size) for size in sizes] == [
        "0.0 MiB", "0.002 MiB", "1.0 MiB", "812.5 MiB", "17.00 GiB", "-3.00 GiB",
    ]  # fmt: skip

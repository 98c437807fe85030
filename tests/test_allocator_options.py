"""The options of torch's allocator: read from the environment as torch reads them, or refused."""

import json
import os
import subprocess
import sys

import pytest

from lowmem_grpo.allocator_options import read_options, simulated_options
from lowmem_grpo.errors import ConfigError
from tests.runs import call

OLD, NEW = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
MIB = 1024**2


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("", {}),
        ("expandable_segments:True", {"expandable_segments": True}),
        (" max_split_size_mb : 64 , ", {"max_split_size": 64 * MIB}),
        ("max_split_size_mb:20.7", {"max_split_size": 20 * MIB}),
        ("garbage_collection_threshold:.8", {"garbage_collection_threshold": 0.8}),
        ("per_process_memory_fraction:5e-1", {"process_fraction": 0.5}),
        ("roundup_power2_divisions:8", {"roundup_power2_divisions": 8}),
        (
            "roundup_power2_divisions:[4:1,16:2,64:8,>:4]",
            {"roundup_power2_divisions": (1, 1, 1, 0, 2, 0, 8, *[4] * 9)},
        ),
        (
            "large_segment_size_mb:14,max_split_size_mb:15",
            {"large_segment_size": 14 * MIB, "max_split_size": 15 * MIB},
        ),
        ("backend:native,pinned_use_background_threads:True,throw_on_cudamalloc_oom:True", {}),
        ("expandable_segments:True,expandable_segments:True", {"expandable_segments": True}),
    ],
)
def test_options_are_read_as_torch_reads_them(text, settings):
    assert read_options({NEW: text}).settings() == settings


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("expandable_segment:True", "did you mean 'expandable_segments'"),
        ("expandable_segments:true", "'true' must be True or False"),
        ("expandable_segments", "ends where a value for expandable_segments should be"),
        ("max_split_size_mb:19", "19 must be 20 or more"),
        ("max_split_size_mb:64,large_segment_size_mb:80", "64 must be 80 or more"),
        ("large_segment_size_mb:10", "10 must be 11 or more"),
        ("large_segment_size_mb:13,expandable_segments:True", "must be even"),
        ("max_split_size_mb:much", "'much' is not a whole number"),
        ("garbage_collection_threshold:1", "must be above 0 and below 1"),
        ("per_process_memory_fraction:1.5", "must be 0 to 1"),
        ("roundup_power2_divisions:3", "3 must be a power of two"),
        ("roundup_power2_divisions:[4:8,5:2]", "size 5 must be a power of two"),
        ("roundup_power2_divisions:[4:8", "it ends where"),
        ("pinned_num_register_threads:3", "must be a power of two, 128 at most"),
        ("backend:malloc", "must be native or cudaMallocAsync"),
        ("max_split_size_mb:64,max_split_size_mb:32", "64 and 32 are given"),
    ],
)
def test_what_torch_refuses_is_refused_with_the_value(text, says):
    with pytest.raises(ConfigError, match="unset PYTORCH_ALLOC_CONF") as refused:
        read_options({NEW: text})
    assert says in str(refused.value)
    assert text in str(refused.value)


def test_the_older_name_counts_alone_where_both_are_set():
    both = read_options({NEW: "expandable_segments:True", OLD: "max_split_size_mb:64"})
    assert both.settings() == {"max_split_size": 64 * MIB}
    assert f"{NEW} is set too" in both.line
    assert read_options({NEW: "expandable_segments:True", OLD: ""}).settings() == {}
    assert read_options({OLD: "expandable_segments:True"}).settings()["expandable_segments"]


def test_what_has_no_effect_on_the_card_is_said():
    line = read_options({NEW: "pinned_free_catch_all:True,max_split_size_mb:64"}).line
    assert "pinned_free_catch_all = True (no effect on the card)" in line
    assert "max_split_size_mb = 64," not in line
    assert "max_split_size_mb = 64;" in line


@pytest.mark.parametrize(
    "environ", [{NEW: "backend:cudaMallocAsync"}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}]
)
def test_allocators_that_are_not_simulated_are_refused(environ):
    with pytest.raises(ConfigError, match="no plan"):
        simulated_options(environ)


def test_commands_end_with_2_before_torch_is_imported():
    code = (
        "import sys\nfrom lowmem_grpo.cli import main\n"
        "for args in (['plan'], ['train'], ['memory', 'profile'], ['eval', 'x'], ['sample', 'x'],\n"
        "             ['doctor'], ['export', 'x', '--output', 'y'],\n"
        "             ['rollouts', '--groups', '1', '--output', 'y']):\n"
        "    try:\n        main(args)\n"
        "    except SystemExit as end:\n        assert end.code == 2, (args, end.code)\n"
        "assert 'torch' not in sys.modules"
    )
    environ = os.environ | {NEW: "max_split_size_mb"}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("error: PYTORCH_ALLOC_CONF=max_split_size_mb: ") == 8


def test_a_plan_is_made_for_the_options_in_force(tiny_model_dir, monkeypatch):
    """On a card that the process may fill by a tenth only, in long segments."""
    monkeypatch.setenv(OLD, "large_segment_size_mb:64,per_process_memory_fraction:0.1")
    small = ["--model", tiny_model_dir, "--profile", "rtx-4090-24gb", "--num-generations=2"]
    small += ["--max-prompt-length=16", "--max-completion-length=16", "--problems-per-step=1"]
    plan = json.loads(call("plan", *small, "--json").stdout)
    assert plan["allocator"] == {
        "source": f"{OLD}=large_segment_size_mb:64,per_process_memory_fraction:0.1",
        "settings": {"large_segment_size_mb": 64, "per_process_memory_fraction": 0.1},
        "without_effect": [],
    }
    room = int(0.1 * plan["card"]["memory_bytes"])
    assert plan["headroom_bytes"] + plan["peak_reserved_bytes"] == room
    assert plan["peak_reserved_bytes"] >= 64 * MIB  # of which 17 are in use
    text = " ".join(call("plan", *small).stdout.split())
    assert "allocator: large_segment_size_mb = 64, per_process_memory_fraction = 0.1" in text

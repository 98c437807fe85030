"""Choices for machines that are not here: every card is a made-up `Machine`."""

import json
import subprocess
import sys
import types

import pytest

from lowmem_grpo import doctor, hardware
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.hardware import Choice, Machine, choose_attention, choose_compute_dtype

GIB = 2**30


def card(capability=(8, 9), name="NVIDIA GeForce RTX 4090", **fields):
    defaults = {
        "device_type": "cuda",
        "name": name,
        "memory_bytes": 24 * GIB,
        "compute_capability": capability,
        "cpu_name": "a CPU",
        "cpu_threads": 8,
        "host_memory_bytes": 32 * GIB,
        "bf16_cpu": None,
        "versions": {"torch": "2.13.0"},
        "device_index": 0,
    }
    return Machine(**(defaults | fields))


def cpu(bf16=None):
    return card(None, "a CPU", device_type="cpu", device_index=None, bf16_cpu=bf16)


@pytest.mark.parametrize(
    ("machine", "dtype"),
    [
        (card((12, 0)), "bfloat16"),
        (card((9, 0)), "bfloat16"),
        (card((8, 0)), "bfloat16"),
        (card((7, 5)), "float16"),
        (card((7, 0)), "float16"),
        (card((6, 1)), "float32"),
        (cpu("this CPU multiplies bf16 in hardware (AMX)"), "bfloat16"),
        (cpu(), "float32"),
    ],
)
def test_compute_dtype_follows_the_machine(machine, dtype):
    choice = choose_compute_dtype(machine)
    assert choice.value == dtype
    assert choice.reason


def test_float16_comes_with_gradient_scaling():
    assert "gradient scaling" in choose_compute_dtype(card((7, 5))).reason
    assert "gradient scaling" in choose_compute_dtype(card((8, 9)), "float16").reason


@pytest.mark.parametrize("machine", [card((8, 6)), card((7, 5)), cpu()])
def test_float32_can_always_be_had(machine):
    assert choose_compute_dtype(machine, "float32").value == "float32"


def test_a_cpu_without_bf16_does_as_asked_and_says_what_it_costs():
    choice = choose_compute_dtype(cpu(), "bfloat16")
    assert choice.value == "bfloat16"
    assert "float32" in choice.reason


@pytest.mark.parametrize(
    ("machine", "requested", "way_out"),
    [
        (card((7, 5), "Tesla T4"), "bfloat16", "use float16"),
        (card((6, 1), "GTX 1080"), "bfloat16", "use float32"),
        (cpu(), "float16", "use float32"),
        (cpu("AMX"), "float16", "use bfloat16"),
        (card(), "bf16", "use auto, bfloat16"),
    ],
)
def test_an_impossible_dtype_is_refused_with_what_works(machine, requested, way_out):
    with pytest.raises(ConfigError, match=way_out) as error:
        choose_compute_dtype(machine, requested)
    assert requested in str(error.value)
    assert error.value.exit_code == 2


FLASH = {"torch": "2.13.0", "flash_attn": "2.8.3"}


@pytest.mark.parametrize(
    ("machine", "dtype", "backend"),
    [
        (card(versions=FLASH), "bfloat16", "flash_attn"),
        (card(versions=FLASH), "float16", "flash_attn"),
        (card(), "bfloat16", "torch_varlen"),
        (card((8, 0)), "float16", "torch_varlen"),
        (card((12, 0)), "bfloat16", "torch_varlen"),
        (card(versions=FLASH), "float32", "sdpa"),
        (card((7, 5), versions=FLASH), "float16", "sdpa"),
        (card(unusable={"torch_varlen": "torch 2.9.0 has none"}), "bfloat16", "sdpa"),
        (cpu("AMX"), "bfloat16", "tiled"),
        (cpu(), "float32", "tiled"),
    ],
)
def test_attention_follows_card_dtype_and_software(machine, dtype, backend):
    choice = choose_attention(machine, dtype)
    assert choice.value == backend
    assert choice.reason


def test_the_reason_says_what_is_missing():
    broken = card(unusable={"flash_attn": "undefined symbol", "torch_varlen": "too old"})
    assert "too old" in choose_attention(broken, "bfloat16").reason
    fallen_back = card(unusable={"flash_attn": "undefined symbol"})
    assert "undefined symbol" in choose_attention(fallen_back, "bfloat16").reason
    assert "8.0" in choose_attention(card((7, 5)), "float16").reason


@pytest.mark.parametrize(
    ("head_dim", "backend"), [(128, "torch_varlen"), (300, "sdpa"), (68, "sdpa")]
)
def test_a_head_size_can_rule_flash_out(head_dim, backend):
    choice = choose_attention(card(), "bfloat16", head_dim=head_dim)
    assert choice.value == backend
    if backend == "sdpa":
        assert str(head_dim) in choice.reason


@pytest.mark.parametrize(
    ("machine", "dtype", "requested", "message"),
    [
        (card(), "bfloat16", "flash_attn", "not installed; use torch_varlen"),
        (card((7, 5), versions=FLASH), "float16", "flash_attn", "8.0, this card has 7.5; use sdpa"),
        (card(), "float32", "torch_varlen", "not float32; use sdpa"),
        (cpu(), "float32", "torch_varlen", "needs a CUDA card; use tiled"),
        (card(), "bfloat16", "flash", "use auto, flash_attn, torch_varlen, sdpa, tiled"),
    ],
)
def test_an_impossible_attention_is_refused_with_what_works(machine, dtype, requested, message):
    with pytest.raises(ConfigError, match=message):
        choose_attention(machine, dtype, requested)


def test_an_explicit_attention_that_works_is_taken():
    assert (
        choose_attention(card(versions=FLASH), "bfloat16", "torch_varlen").value == "torch_varlen"
    )
    assert choose_attention(cpu(), "float32", "sdpa").value == "sdpa"
    assert choose_attention(card(), "bfloat16", "tiled").value == "tiled"


def fake_torch(
    *, cuda="12.8", hip=None, cards=(((8, 9), "A card"),), archs=("sm_80", "sm_90"), fails=None
):
    def init():
        if fails:
            raise RuntimeError(fails)

    return types.SimpleNamespace(
        __version__="2.13.0",
        version=types.SimpleNamespace(cuda=cuda, hip=hip),
        cuda=types.SimpleNamespace(
            init=init,
            device_count=lambda: len(cards),
            get_device_capability=lambda index: cards[index][0],
            get_device_name=lambda index: cards[index][1],
            get_arch_list=lambda: list(archs),
        ),
    )


@pytest.mark.parametrize(
    ("torch", "requested", "device", "reason"),
    [
        (fake_torch(), "auto", "cuda:0", "the card in this machine"),
        (fake_torch(cards=[((8, 9), "A"), ((8, 6), "B")]), "auto", "cuda:0", "first of 2"),
        (fake_torch(), "cuda", "cuda:0", "as asked"),
        (fake_torch(cards=[((8, 9), "A"), ((8, 6), "B")]), "cuda:1", "cuda:1", "as asked"),
        (fake_torch(), "cpu", "cpu", "as asked"),
        (fake_torch(cuda=None), "auto", "cpu", "CPU build"),
        (fake_torch(cuda=None, hip="6.4"), "auto", "cpu", "ROCm"),
        (
            fake_torch(fails="Found no NVIDIA driver on your system. Please"),
            "auto",
            "cpu",
            "driver on",
        ),
        (fake_torch(cards=[((6, 1), "GTX 1080")]), "auto", "cpu", "no kernels for GTX 1080"),
    ],
)
def test_device_choice(monkeypatch, torch, requested, device, reason):
    monkeypatch.setitem(sys.modules, "torch", torch)
    choice = hardware.choose_device(requested)
    assert choice.value == device
    assert reason in choice.reason


@pytest.mark.parametrize(
    ("torch", "requested", "message"),
    [
        (fake_torch(cuda=None), "cuda", "CPU build, without CUDA; use cpu"),
        (fake_torch(fails="Found no NVIDIA driver."), "cuda:0", "no NVIDIA driver.*use cpu"),
        (fake_torch(cards=()), "cuda", "sees no card.*use cpu"),
        (fake_torch(), "cuda:1", "there is 1 card, counted from 0; use cuda:0"),
        (fake_torch(cards=[((8, 9), "A")] * 2), "cuda:7", "are 2 cards.*use cuda:0 to cuda:1"),
        (fake_torch(), "gpu", "'gpu' is unknown: use auto"),
        (fake_torch(), "cuda:-1", "is unknown"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_works(
    monkeypatch, torch, requested, message
):
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(ConfigError, match=message):
        hardware.choose_device(requested)


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], (8, 9), True),
        (["sm_90"], (8, 9), False),
        (["sm_86"], (8, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["sm_90", "sm_90a"], (12, 0), False),
        (["sm_120"], (12, 0), True),
        (["compute_100a"], (12, 0), False),
        (["sm_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        (["sm_75", "sm_80"], (7, 0), False),
    ],
)
def test_which_cards_a_build_of_torch_runs_on(archs, capability, runs):
    assert hardware._has_kernels(archs, capability) is runs


@pytest.mark.parametrize(
    ("capabilities", "onednn", "word"),
    [
        ({"avx512_bf16": True}, True, "AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, True, "AMX"),
        ({"avx512_f": True, "avx512_bf16": False}, True, None),
        ({"avx512_bf16": True}, False, None),
    ],
)
def test_bf16_on_a_cpu_goes_by_its_instructions(capabilities, onednn, word):
    mkldnn = types.SimpleNamespace(is_available=lambda: onednn)
    torch = types.SimpleNamespace(backends=types.SimpleNamespace(mkldnn=mkldnn))
    reason = hardware._why_bf16_is_fast(torch, capabilities)
    assert (reason is None) if word is None else (word in reason)


def test_this_machine_is_detected_the_same_twice():
    machine = hardware.detect("cpu")
    assert machine == hardware.detect("cpu")
    assert (machine.device, machine.compute_capability) == ("cpu", None)
    assert machine.multiprocessors is None
    assert machine.memory_bytes == machine.host_memory_bytes > GIB // 2
    assert {"python", "torch", "transformers", "peft", "bitsandbytes"} <= machine.versions.keys()


def test_doctor_reports_this_machine_as_json_and_as_a_page(tmp_path):
    machine = hardware.detect("cpu")
    choices = {"compute_dtype": choose_compute_dtype(machine), "device": Choice("cpu", "as asked")}
    report = doctor.examine(machine, choices, tmp_path / "not" / "yet")
    assert json.loads(json.dumps(report)) == report
    assert report["choices"]["device"] == {"value": "cpu", "reason": "as asked"}
    assert report["cache"]["exists"] is False
    assert report["cache"]["free_bytes"] > 0
    assert 0 < report["memory"]["free_bytes"] <= machine.memory_bytes
    page = doctor.page(report)
    assert machine.cpu_name in page
    assert choices["compute_dtype"].reason in page


@pytest.fixture
def a_card_that_is_not_there(monkeypatch):
    """The real torch, told that it is a CUDA build with one RTX 3060."""
    import torch

    properties = types.SimpleNamespace(
        name="NVIDIA GeForce RTX 3060",
        total_memory=11906 * 2**20,
        major=8,
        minor=6,
        multi_processor_count=28,
    )
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 * GIB, 11906 * 2**20))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it fails, installed or not


def test_a_card_is_detected_with_what_its_software_can_do(a_card_that_is_not_there):
    machine = hardware.detect()
    assert (machine.device, machine.name) == ("cuda:0", "NVIDIA GeForce RTX 3060")
    assert (machine.compute_capability, machine.memory_bytes) == ((8, 6), 11906 * 2**20)
    assert machine.multiprocessors == 28
    assert machine.memory_bytes != machine.host_memory_bytes
    assert machine.versions["cuda"] == "12.8"
    assert "flash_attn" not in machine.versions
    assert "not installed" in machine.unusable["flash_attn"]
    expected = "sdpa" if "torch_varlen" in machine.unusable else "torch_varlen"
    assert choose_attention(machine, "bfloat16").value == expected


def test_an_old_varlen_and_a_broken_flash_attn_are_named(a_card_that_is_not_there, monkeypatch):
    broken = types.ModuleType("flash_attn")  # as flash-attn-4 alone leaves it: no varlen function
    monkeypatch.setitem(sys.modules, "flash_attn", broken)
    old = types.ModuleType("torch.nn.attention.varlen")
    old.varlen_attn = lambda query, key, value, is_causal=False: None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", old)
    machine = hardware.detect("cuda")
    assert "does not load" in machine.unusable["flash_attn"]
    assert "2.12" in machine.unusable["torch_varlen"]
    assert choose_attention(machine, "bfloat16").value == "sdpa"


def test_doctor_warns_when_bitsandbytes_has_no_cuda_library(a_card_that_is_not_there, tmp_path):
    pytest.importorskip("bitsandbytes")
    import torch

    if torch.version.hip or torch.backends.cuda.is_built():
        pytest.skip("needs the CPU build of torch, under which bitsandbytes loads its CPU library")
    report = doctor.examine(hardware.detect("cuda:0"), {}, tmp_path)
    assert report["memory"]["free_bytes"] == 10 * GIB
    assert any("no CUDA code" in warning for warning in report["warnings"])
    assert "10.0 GiB free of 11.6 GiB" in doctor.page(report)


def test_describe_shows_a_card_by_its_names():
    report = hardware.describe(card(), {"profile": Choice(types.SimpleNamespace(name="p"), "why")})
    assert report["machine"]["compute_capability"] == "8.9"
    assert report["machine"]["device"] == "cuda:0"
    assert report["choices"] == {"profile": {"value": "p", "reason": "why"}}


def test_importing_these_modules_does_not_import_torch():
    code = (
        "import sys, lowmem_grpo.hardware, lowmem_grpo.doctor, lowmem_grpo.profiles;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'bitsandbytes', 'psutil')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("version", "usable"),
    [("2.5.4", False), ("2.5", False), ("2.5.5", True), ("2.8.3.post1", True), ("2.10.0", True)],
)
def test_a_flash_attn_without_a_backward_pass_for_large_heads_is_too_old(
    a_card_that_is_not_there, monkeypatch, version, usable
):
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = lambda *args: None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(
        hardware.importlib.metadata,
        "version",
        lambda name, own=hardware.importlib.metadata.version: (
            version if name == "flash_attn" else own(name)
        ),
    )
    machine = hardware.detect("cuda")
    assert ("flash_attn" in machine.versions) is usable
    if not usable:
        assert "too old (2.5.5 or newer" in machine.unusable["flash_attn"]

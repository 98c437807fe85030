"""The shipped profiles, one by one, and how one is found, checked and chosen."""

import json
import shutil
from pathlib import Path

import pytest

from lowmem_grpo import profiles
from lowmem_grpo.config import build_config
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.hardware import Machine
from lowmem_grpo.profiles import choose_profile, detect_text, list_profiles, load_profile
from lowmem_grpo.sections import MemoryConfig

GIB = 2**30
MIB = 2**20
ALL = list_profiles()
CARDS = [profile for profile in ALL if profile.name != "cpu"]


def machine(name, memory_gib, capability, multiprocessors=None):
    return Machine(
        device_type="cuda",
        name=name,
        memory_bytes=int(memory_gib * GIB),
        compute_capability=capability,
        cpu_name="a CPU",
        cpu_threads=8,
        host_memory_bytes=32 * GIB,
        bf16_cpu=None,
        versions={},
        device_index=0,
        multiprocessors=multiprocessors,
    )


CPU = Machine("cpu", "AMD EPYC", 16 * GIB, None, "AMD EPYC", 2, 16 * GIB, None, {})


def test_the_cpu_comes_first_and_then_the_cards_by_memory():
    assert ALL[0].name == "cpu"
    sizes = [profile.card["memory_gib"] for profile in CARDS]
    assert sizes == sorted(sizes)
    assert {"rtx-3090-24gb", "rtx-4090-24gb"} <= {profile.name for profile in ALL}


@pytest.mark.parametrize("profile", CARDS, ids=lambda profile: profile.name)
def test_every_card_has_plausible_figures_with_sources(profile):
    card = profile.card
    assert profile.name.endswith(f"-{card['memory_gib']}gb")
    # The driver and ECC keep between nothing and a tenth of the printed size.
    assert 0.9 < card["visible_mib"] / 1024 / card["memory_gib"] < 1.0
    assert (7, 5) <= profile.compute_capability <= (12, 0)
    assert 250 < card["bandwidth_gb_s"] < 4000
    rate = "bf16_tflops" if profile.compute_capability >= (8, 0) else "fp16_tflops"
    assert 20 < card[rate] < 1000
    assert ("bf16_tflops" in card) == (profile.compute_capability >= (8, 0))
    # Operations of a multiprocessor in a clock: the rest of the rate is the clock, in GHz.
    per_clock = {(8, 0): 2048, (9, 0): 4096}.get(profile.compute_capability, 1024)
    if "GeForce" in card["name"]:
        per_clock = 512
    assert 1.4 < card[rate] * 1000 / profile.multiprocessors / per_clock < 2.7
    assert 0 <= card["desktop_mib"] < 2000
    sources = " ".join(card["sources"])
    named = ("visible:", "compute capability:", "multiprocessors:", "rate:", "desktop:")
    for figure in ("memory", "bandwidth", *named):
        assert figure in sources, f"no source for the {figure}"


@pytest.mark.parametrize("profile", ALL, ids=lambda profile: profile.name)
def test_every_profile_names_the_memory_settings_and_cards_leave_them_to_the_plan(profile):
    memory = profile.settings["memory"]
    assert list(memory) == list(MemoryConfig.model_fields)
    assert profile.path.stem == profile.name
    if profile.name != "cpu":
        assert set(memory.values()) == {"auto"}
        assert "never run on this card" in profile.path.read_text().casefold()
    build_config([("profile", profile.settings)])


@pytest.mark.parametrize("profile", CARDS, ids=lambda profile: profile.name)
def test_auto_finds_every_card_by_any_of_its_names(profile):
    for name in (profile.card["name"], *profile.card.get("aliases", [])):
        here = machine(name, profile.memory_bytes / GIB, profile.compute_capability)
        choice = choose_profile("auto", here)
        assert choice.value == profile
        assert name in choice.reason


@pytest.mark.parametrize(
    ("here", "name"),
    [
        (machine("GeForce RTX 3090", 23.7, (8, 6)), "rtx-3090-24gb"),  # an old driver's spelling
        (machine("NVIDIA GeForce RTX 4090", 23.99, (8, 9)), "rtx-4090-24gb"),  # Windows
        (machine("NVIDIA GeForce RTX 4090", 23.4, (8, 9)), "rtx-4090-24gb"),  # a newer driver
        (machine("NVIDIA RTX 4500 Ada Generation", 23.6, (8, 9)), "rtx-4090-24gb"),
        (machine("NVIDIA GeForce RTX 3090 Ti", 23.7, (8, 6)), "rtx-3090-24gb"),
        (machine("NVIDIA GeForce RTX 3080", 9.8, (8, 6)), "rtx-3080-10gb"),
        (machine("NVIDIA GeForce RTX 3080", 11.8, (8, 6)), "rtx-3080-12gb"),
        (machine("NVIDIA GeForce RTX 4090", 47.4, (8, 9)), "l40s-48gb"),  # refitted with 48 GB
        (machine("NVIDIA A10G", 22.06, (8, 6)), "a10-24gb"),
        (machine("NVIDIA A100 80GB PCIe MIG 3g.40gb", 39.4, (8, 0)), "a100-40gb"),
        (machine("Tesla V100-SXM2-16GB", 15.8, (7, 0)), "t4-16gb"),
    ],
)
def test_auto_goes_by_name_then_by_memory_and_capability(here, name):
    choice = choose_profile("auto", here)
    assert choice.value.name == name
    assert here.name in choice.reason


def test_auto_never_takes_a_profile_with_more_memory_than_the_card():
    for memory in (10, 11, 12, 15, 16, 20, 24, 32, 40, 47, 64, 80, 141):
        chosen = choose_profile("auto", machine("a card", memory, (8, 6))).value
        assert chosen.memory_bytes <= memory * GIB * 1.03


def test_a_card_below_all_profiles_gets_one_made_for_it():
    choice = choose_profile("auto", machine("NVIDIA GeForce RTX 4060", 7.6, (8, 9)))
    assert choice.value.path is None
    assert choice.value.name == "rtx-4060-8gb"
    assert set(choice.value.settings["memory"].values()) == {"auto"}
    assert "7.6 GiB" in choice.reason


def test_without_a_card_auto_takes_the_cpu_and_a_request_is_obeyed():
    assert choose_profile("auto", CPU).value.name == "cpu"
    assert choose_profile("rtx-4090-24gb", CPU).value.name == "rtx-4090-24gb"


@pytest.mark.parametrize(
    "here",
    [machine('A "card" GeForce', 15.47, (12, 0), 70), machine("A card", 8, (8, 6)), CPU],
    ids=["card", "card that hides its multiprocessors", "cpu"],
)
def test_a_detected_profile_can_be_loaded_again(tmp_path, here):
    path = tmp_path / f"{profiles.detected_name(here)}.toml"
    path.write_text(detect_text(here))
    profile = load_profile(str(path))
    assert profile.card["name"] == here.name
    assert profile.compute_capability == here.compute_capability
    assert profile.multiprocessors == here.multiprocessors
    assert list(profile.settings["memory"]) == list(MemoryConfig.model_fields)
    if here.device_type == "cuda":
        assert profile.memory_bytes == here.memory_bytes // MIB * MIB


@pytest.mark.parametrize(
    ("here", "name"),
    [
        (machine("NVIDIA GeForce RTX 4060 Laptop GPU", 7.75, (8, 9)), "rtx-4060-laptop-gpu-8gb"),
        (machine("NVIDIA H100 80GB HBM3", 79.2, (9, 0)), "h100-hbm3-80gb"),
        (CPU, "cpu-amd-epyc"),
    ],
)
def test_detected_names(here, name):
    assert profiles.detected_name(here) == name


def test_unknown_names_offer_the_nearest():
    with pytest.raises(ConfigError, match=r"'rtx-4090' is unknown.*'rtx-4090-24gb'.*profiles list"):
        load_profile("rtx-4090")
    with pytest.raises(ConfigError, match="no such file"):
        load_profile("missing.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[card]\nname = \n", "not valid TOML.*line 2"),
        ("[card]\nname = 'a'\n[card]\nname = 'b'\n", "already exists.*line 4"),
        ("", "no .card. with a name"),
        ("[card]\nmemory_gib = 24\n", "no .card. with a name"),
        ("micro_batch_tokens = 1\n[card]\nname = 'a'\n", "micro_batch_tokens = 1 stands outside"),
        ("[card]\nname = 'a'\nmemory_gb = 24\n", "memory_gb is unknown.*'memory_gib'"),
        ("[card]\nname = 'a'\nmemory_gib = '24'\n", "card.memory_gib = '24' is of the wrong type"),
        ("[card]\nname = 'a'\nmemory_gib = -1\n", "must be above zero"),
        ("[card]\nname = 'a'\nmemory_gib = nan\n", "must be above zero and finite"),
        ("[card]\nname = 'a'\nmemory_gib = inf\n", "must be above zero and finite"),
        ("[card]\nname = 'a'\nvisible_mib = true\n", "wrong type"),
        ("[card]\nname = 'a'\nmultiprocessors = 70.5\n", "card.multiprocessors = 70.5 is of the"),
        ("[card]\nname = 'a'\nmultiprocessors = 0\n", "card.multiprocessors = 0 must be above"),
        ("[card]\nname = 'a'\nmemory_gib = 8\n", "compute_capability is missing"),
        ("[card]\nname = 'a'\ncompute_capability = [8.9]\n", "must be like"),
        ("card = 1\n", "card = 1 stands outside"),
        ("notes = 1\n[card]\nname = 'a'\n", "notes = 1 must be text"),
    ],
)
def test_a_malformed_file_is_one_short_error(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        load_profile(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_profile(str(path))


def test_a_file_beside_the_run_is_taken_by_its_suffix(tmp_path, monkeypatch):
    (tmp_path / "mine.toml").write_text("[card]\nname = 'cpu'\n[memory]\nmicro_batch_tokens = 99\n")
    monkeypatch.chdir(tmp_path)
    assert load_profile("mine.toml").settings == {"memory": {"micro_batch_tokens": 99}}


def test_a_checkout_and_a_wheel_both_find_their_profiles(tmp_path):
    checkout = Path(profiles.__file__).parent
    assert profiles.profiles_directory(checkout).is_dir()
    package = tmp_path / "lowmem_grpo"
    package.mkdir()
    assert profiles.profiles_directory(package) == tmp_path / "profiles"
    shutil.copytree(profiles.profiles_directory(checkout), package / "profiles_data")
    assert profiles.profiles_directory(package) == package / "profiles_data"


@pytest.mark.parametrize("profile", ALL, ids=lambda profile: profile.name)
def test_a_profile_is_plain_json(profile):
    fields = profile.as_dict()
    assert json.loads(json.dumps(fields)) == fields
    assert fields["name"] == profile.name

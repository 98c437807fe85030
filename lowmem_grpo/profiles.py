"""Memory profiles: what a card is, and which memory settings it starts from.

A profile is one TOML file a card. Its `[card]` table holds the card's figures with their sources;
every other table (`[memory]`, `[rollout]`, ...) is a section of the configuration and is laid over
the built-in defaults, under the run's own file. Which settings exist is checked where the
configuration is validated, not here.

Keys of `[card]`: `name` (as CUDA reports it, or "cpu"), `aliases`, `memory_gib` (as printed on the
box), `visible_mib` (what CUDA reports as total memory; less, as the driver and ECC keep a part),
`compute_capability`, `multiprocessors` (how many), `bandwidth_gb_s` (10^9 bytes a second),
`bf16_tflops` and `fp16_tflops` (dense tensor rate with fp32 accumulation), `desktop_mib` (what a
desktop on the same card takes), `sources`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from lowmem_grpo.errors import ConfigError, nearest
from lowmem_grpo.hardware import Choice, Machine
from lowmem_grpo.sections import MemoryConfig
from lowmem_grpo.text_files import read_text

_GIB = 2**30
_MIB = 2**20

_CARD_KEYS = {
    "name": str,
    "aliases": list,
    "memory_gib": (int, float),
    "visible_mib": int,
    "compute_capability": list,
    "multiprocessors": int,
    "bandwidth_gb_s": (int, float),
    "bf16_tflops": (int, float),
    "fp16_tflops": (int, float),
    "desktop_mib": int,
    "sources": list,
}

# One driver reports a little less memory than another for the same card.
_DRIVER_SLACK = 1.03


@dataclasses.dataclass(frozen=True)
class Profile:
    """One profile: `settings` maps a section of the configuration to its keys and values."""

    name: str
    path: Path | None
    card: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    notes: str = ""

    @property
    def memory_bytes(self) -> int | None:
        """The memory that CUDA reports for the card, or the printed size; None for a CPU."""
        if "visible_mib" in self.card:
            return self.card["visible_mib"] * _MIB
        if "memory_gib" in self.card:
            return int(self.card["memory_gib"] * _GIB)
        return None

    @property
    def compute_capability(self) -> tuple[int, int] | None:
        """(8, 9) for a card, None for a CPU."""
        pair = self.card.get("compute_capability")
        return (pair[0], pair[1]) if pair else None

    @property
    def multiprocessors(self) -> int | None:
        """How many the card has; None for a CPU, and where the profile does not say."""
        return self.card.get("multiprocessors")

    def as_dict(self) -> dict[str, Any]:
        """The profile as plain JSON values."""
        fields = dataclasses.asdict(self)
        return fields | {"path": str(self.path) if self.path else None}


def profiles_directory(package: Path = Path(__file__).parent) -> Path:
    """Where the shipped profiles lie: inside the package (a wheel) or beside it (a checkout)."""
    shipped = package / "profiles_data"
    return shipped if shipped.is_dir() else package.parent / "profiles"


def list_profiles() -> list[Profile]:
    """All shipped profiles: the CPU first, then cards by memory and name."""
    profiles = [_read(path) for path in profiles_directory().glob("*.toml")]
    return sorted(profiles, key=lambda p: (p.card.get("memory_gib", 0), p.name))


def load_profile(name_or_file: str) -> Profile:
    """The shipped profile of that name, or the profile in that file (a path, or `*.toml`).

    Raises ConfigError when there is none, or it is malformed.
    """
    path = Path(name_or_file)
    if path.suffix == ".toml" or len(path.parts) > 1:
        if not path.is_file():
            raise ConfigError(f"profile {name_or_file}: there is no such file")
        return _read(path)
    directory = profiles_directory()
    path = directory / f"{name_or_file}.toml"
    if not path.is_file():
        names = sorted(file.stem for file in directory.glob("*.toml"))
        raise ConfigError(
            f"profile {name_or_file!r} is unknown{nearest(name_or_file, names)}; "
            "`lowmem-grpo profiles list` shows all, a file needs its .toml"
        )
    return _read(path)


def choose_profile(requested: str, machine: Machine) -> Choice:
    """Choose a `Profile`: "auto" goes by the machine, anything else is a name or a file.

    auto, on a card: the profile of that name whose memory the card has; otherwise the closest one
    with no more memory than the card (the most memory, then the nearest compute capability that is
    not above the card's); below the smallest profile, one that `detect_text` makes.
    """
    if requested != "auto":
        return Choice(load_profile(requested), "as asked")
    if machine.device_type == "cpu":
        return Choice(load_profile("cpu"), "there is no card to use")
    limit = machine.memory_bytes * _DRIVER_SLACK
    cards = [p for p in list_profiles() if p.memory_bytes and p.memory_bytes <= limit]
    # The name alone does not do: one name is sold with 8 or 16 GB, or refitted with twice as much.
    named = [
        p
        for p in cards
        if _bare(machine.name) in _card_names(p) and p.memory_bytes > 0.9 * machine.memory_bytes
    ]
    if named:
        return Choice(max(named, key=lambda p: p.memory_bytes), f"the card is {machine.name}")
    size = f"{machine.memory_bytes / _GIB:.1f} GiB"
    if not cards:
        profile = _parse(detect_text(machine), detected_name(machine), None)
        return Choice(profile, f"no profile is as small as {size}: settings in proportion to that")
    profile = max(cards, key=lambda p: _closeness(p, machine))
    reason = f"no profile for {machine.name} with {size}: the closest with no more memory"
    return Choice(profile, reason)


def detected_name(machine: Machine) -> str:
    """A name for this machine's own profile: `rtx-4060-laptop-gpu-8gb`."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"nvidia|geforce", "", machine.name.casefold()))
    if machine.device_type == "cpu":
        return "-".join(["cpu", *(word for word in words if word != "cpu")])
    size = f"{math.ceil(machine.memory_bytes / _GIB)}gb"
    return "-".join(word for word in [*words, size] if word != size) + f"-{size}"


def detect_text(machine: Machine) -> str:
    """A profile for this machine, as the text of a TOML file: `profiles detect` prints it."""
    lines = [f"# {machine.name}, as detected on this machine. Change what you like."]
    lines += ["[card]", f"name = {json.dumps(machine.name, ensure_ascii=False)}"]
    if machine.device_type == "cpu":
        settings = load_profile("cpu").settings["memory"]
    else:
        major, minor = machine.compute_capability
        lines.append(f"visible_mib = {machine.memory_bytes // _MIB}  # total memory, as CUDA says")
        lines.append(f"compute_capability = [{major}, {minor}]")
        if machine.multiprocessors is not None:
            lines.append(f"multiprocessors = {machine.multiprocessors}")
        settings = dict.fromkeys(MemoryConfig.model_fields, "auto")
        lines += ["", "# auto: the memory plan chooses, for the model and the lengths of a run."]
    lines += ["", "[memory]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


def _closeness(profile: Profile, machine: Machine) -> tuple[float, bool, int, int, str]:
    """Sorts profiles for a card: greater is closer. The name settles what is left, always alike."""
    ours = machine.compute_capability[0] * 10 + machine.compute_capability[1]
    theirs = profile.compute_capability[0] * 10 + profile.compute_capability[1]
    size = profile.card.get("memory_gib", profile.memory_bytes / _GIB)
    return size, theirs <= ours, -abs(theirs - ours), profile.memory_bytes, profile.name


def _card_names(profile: Profile) -> set[str]:
    return {_bare(name) for name in (profile.card["name"], *profile.card.get("aliases", []))}


def _bare(name: str) -> str:
    # Drivers differ in whether they put the maker first.
    return name.casefold().removeprefix("nvidia ")


def _read(path: Path) -> Profile:
    try:
        text = read_text(path)
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot read it: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"profile {path}: {error}") from error
    return _parse(text, path.stem, path)


def _parse(text: str, name: str, path: Path | None) -> Profile:
    import tomlkit
    from tomlkit.exceptions import TOMLKitError

    where = f"profile {path or name}"
    try:
        content = tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        # The message ends in the line and column.
        raise ConfigError(f"{where}: not valid TOML: {error}") from error
    notes = content.pop("notes", "")
    if not isinstance(notes, str):
        raise ConfigError(f"{where}: notes = {notes!r:.100} must be text")
    for section, table in content.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: {section} = {table!r:.100} stands outside any [section]")
    card = content.pop("card", None)
    if card is None or "name" not in card:
        raise ConfigError(f"{where}: it has no [card] with a name")
    _check_card(where, card)
    return Profile(name, path, card, content, notes)


def _check_card(where: str, card: dict[str, Any]) -> None:
    for key, value in card.items():
        if key not in _CARD_KEYS:
            raise ConfigError(f"{where}: card.{key} is unknown{nearest(key, _CARD_KEYS)}")
        if not isinstance(value, _CARD_KEYS[key]) or isinstance(value, bool):
            raise ConfigError(f"{where}: card.{key} = {value!r:.100} is of the wrong type")
        if isinstance(value, (int, float)) and not (
            0 < value < math.inf or (value == 0 and key == "desktop_mib")
        ):
            raise ConfigError(f"{where}: card.{key} = {value!r:.100} must be above zero and finite")
    pair = card.get("compute_capability")
    if pair is not None and not (len(pair) == 2 and all(type(part) is int for part in pair)):
        raise ConfigError(f"{where}: card.compute_capability = {pair!r:.100} must be like [8, 9]")
    if pair is None and {"memory_gib", "visible_mib"} & card.keys():
        raise ConfigError(f"{where}: card.compute_capability is missing, like [8, 9]")

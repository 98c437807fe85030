"""What a plan is made for: a card by its figures, or the memory of this host."""

from __future__ import annotations

import dataclasses

from lowmem_grpo.allocator_options import AllocatorOptions, simulated_options
from lowmem_grpo.errors import ConfigError
from lowmem_grpo.hardware import Choice, Machine, choose_attention, choose_compute_dtype
from lowmem_grpo.memory.allocator import MIB, AllocatorSettings
from lowmem_grpo.profiles import Profile

__all__ = [
    "CONTEXT_BYTES", "HOST_CONTEXT_BYTES", "MARGIN", "PlanCard", "card_choices", "machine_card",
    "plan_card",
]  # fmt: skip

# Published: 287 MB (CUDA 11.7, lazy loading) to 667 MB (without); 426 MiB on an RTX 6000 Ada with
# torch 2.10. A range until it is measured on the card.
CONTEXT_BYTES = (300 * MIB, 600 * MIB)
# Measured: 423 MiB resident with a tiny model loaded (Python 3.11, torch 2.13 CPU build). The upper
# end is an allowance: what malloc keeps of freed memory is not bounded by anything.
HOST_CONTEXT_BYTES = (400 * MIB, 1200 * MIB)
MARGIN = 0.02
DEFAULTS = AllocatorOptions()


@dataclasses.dataclass(frozen=True)
class PlanCard:
    """A card to plan for: memory as CUDA reports it, and what the desktop takes of it, in bytes.

    Without a compute capability it is a CPU, and the memory is the host's. `host_bytes` is the host
    memory beside a card, None where the plan is for another machine.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int] | None
    desktop_bytes: int = 0
    multiprocessors: int | None = None
    host_bytes: int | None = None
    machine: Machine | None = None
    """The machine that has the card, where it is this one."""
    options: AllocatorOptions = DEFAULTS
    """How the environment sets torch's allocator; by default not at all."""

    def __post_init__(self) -> None:
        if self.memory_bytes <= 0:
            raise ConfigError(f"a card of {self.memory_bytes} bytes: give its memory")

    @property
    def cuda(self) -> bool:
        return self.compute_capability is not None

    @property
    def context_bytes(self) -> tuple[int, int]:
        """What is taken before the first tensor: from, to."""
        return CONTEXT_BYTES if self.cuda else HOST_CONTEXT_BYTES

    @property
    def available_bytes(self) -> int:
        """For the tensors: without the desktop, with a context at its largest, and no more than the
        allocator may take.
        """
        room = self.memory_bytes - self.desktop_bytes - self.context_bytes[1]
        fraction = self.options.settings().get("process_fraction", 1.0)
        return min(room, int(fraction * self.memory_bytes))

    @property
    def margin_bytes(self) -> int:
        """What the plan's own choices leave free: as much as a prediction may be off by."""
        return int(MARGIN * self.memory_bytes)

    def allocator(self, room: int | None = None) -> AllocatorSettings:
        """The settings of this process's allocator, which CUDA gives `room` bytes, 1 or more; None:
        as many as it asks for.
        """
        settings = self.options.settings()
        if room is None:
            settings.pop("process_fraction", None)
            return AllocatorSettings(**settings)
        others = self.memory_bytes - room
        return AllocatorSettings(card_memory=self.memory_bytes, outside_bytes=others, **settings)


def plan_card(profile: Profile, machine: Machine) -> PlanCard:
    """The card of a profile; where it has none (cpu), `machine`'s memory. `machine` also says how
    much host memory there is, where its device is of the profile's kind. The allocator is this
    process's, whichever machine has the card. Raises ConfigError for its options.
    """
    if profile.memory_bytes is None or profile.compute_capability is None:
        return PlanCard(machine.cpu_name, machine.host_memory_bytes, None)
    return PlanCard(
        profile.card["name"],
        profile.memory_bytes,
        profile.compute_capability,
        profile.card.get("desktop_mib", 0) * MIB,
        profile.multiprocessors,
        _host_room(machine) if machine.device_type == "cuda" else None,
        options=simulated_options(),
    )


def machine_card(machine: Machine) -> PlanCard:
    """The card of this machine, with what others hold of it now; or its host memory. Raises
    ConfigError for options of the allocator in the environment.
    """
    if machine.device_type == "cpu":
        return PlanCard(machine.cpu_name, machine.host_memory_bytes, None)
    options = simulated_options()
    import torch

    # Asking starts our own context, at its smallest as yet.
    free, total = torch.cuda.mem_get_info(machine.device_index)
    return PlanCard(
        machine.name,
        machine.memory_bytes,
        machine.compute_capability,
        max(0, total - free - CONTEXT_BYTES[0]),
        machine.multiprocessors,
        _host_room(machine),
        machine,
        options,
    )


def _host_room(machine: Machine) -> int:
    """What can be pinned: a tenth of the memory and a process at its largest are left alone."""
    return max(0, machine.host_memory_bytes * 9 // 10 - HOST_CONTEXT_BYTES[1])


def card_choices(config, card: PlanCard, head_dim: int | None) -> tuple[Choice, Choice]:
    """Compute dtype and attention backend as `train` would choose them on that card."""
    machine = card.machine or Machine(
        device_type="cuda",
        name=card.name,
        memory_bytes=card.memory_bytes,
        compute_capability=card.compute_capability,
        cpu_name="",
        cpu_threads=0,
        host_memory_bytes=0,
        bf16_cpu=None,
        # A package that is asked for is taken to be installed there.
        versions={"flash_attn": "?"} if config.model.attention == "flash_attn" else {},
    )
    dtype = choose_compute_dtype(machine, config.model.compute_dtype)
    wanted = config.model.attention
    attention = choose_attention(machine, dtype.value, wanted, head_dim=head_dim)
    if card.machine is None and wanted == "auto" and attention.value == "torch_varlen":
        attention = Choice("torch_varlen", "flash attention, which compute capability 8.0 has")
    return dtype, attention

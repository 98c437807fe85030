"""The accountant: what the card's memory holds in every phase, predicted and measured."""

from lowmem_grpo.memory.allocator import AllocatorSettings
from lowmem_grpo.memory.replay import replay
from lowmem_grpo.memory.simulate import simulate

__all__ = ["AllocatorSettings", "replay", "simulate"]

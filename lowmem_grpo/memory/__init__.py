"""The accountant: what the card's memory holds in every phase, predicted and measured."""

# The functions, which hide the files of the same names from here on.
from lowmem_grpo.memory.allocator import AllocatorSettings
from lowmem_grpo.memory.replay import replay
from lowmem_grpo.memory.simulate import simulate
from lowmem_grpo.memory.trace import trace

__all__ = ["AllocatorSettings", "replay", "simulate", "trace"]

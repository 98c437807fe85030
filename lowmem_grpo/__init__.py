"""GRPO on a 4-bit base with LoRA adapters, the whole loop on one consumer GPU."""

__version__ = "0.1.0"

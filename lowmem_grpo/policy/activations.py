"""What of the forward pass is kept for the backward pass, and what is computed again.

Checkpointing keeps the input of each transformer layer (tokens x D in the compute dtype) and
computes the layer again in backward (Chen et al., arXiv 1604.06174). It is transformers' own, in
torch's non-reentrant form, which passes keyword arguments such as the attention layout through.
"""

__all__ = ["set_checkpointing"]


def set_checkpointing(model, enabled: bool) -> None:
    """Switch layer checkpointing of a transformers model on or off. Takes effect in train mode
    only.
    """
    # transformers 5.23 renamed the pair and warns about the old names, which are all that 5.0 has.
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        # No random numbers are drawn in the forward pass (dropout is off), so their state need not
        # be kept.
        switch = getattr(model, f"{kind}_checkpointing_enable")
        switch({"use_reentrant": False, "preserve_rng_state": False})
    else:
        getattr(model, f"{kind}_checkpointing_disable")()

"""The reward of the workloads. In a file of its own: the product loads rewards by file."""


def reward(completions, flat, **_):
    """Something that differs between completions; the same for all of a flat problem's."""
    return [0.0 if f else float(len(c) % 7) for c, f in zip(completions, flat, strict=True)]

"""Arrow's cells as Python objects: numbers of less than 64 bits as their shortest decimal."""

from __future__ import annotations

from typing import Any

__all__ = ["exact"]


def exact(value: Any, kind: Any) -> Any:
    """`value` of the Arrow type `kind`, in which a float32 or float16 is the float with the
    shortest decimal that it has in its own precision: 0.1, and not 0.10000000149011612.
    """
    import numpy
    import pyarrow.types as types

    if value is None:
        return None
    if types.is_float32(kind):
        return float(str(numpy.float32(value)))
    if types.is_float16(kind):
        return float(str(numpy.float16(value)))
    if types.is_dictionary(kind):
        return exact(value, kind.value_type)
    if types.is_struct(kind):
        inside = {field.name: field.type for field in kind}
        return {name: exact(each, inside[name]) for name, each in value.items()}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return [exact(each, kind.value_type) for each in value]
    return value

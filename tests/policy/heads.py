"""Heads, rows and tiles of ugly sizes, as strategies."""

from hypothesis import strategies as st

UGLY_HEADS = {
    "rows": st.integers(1, 9),
    "vocab": st.integers(2, 40),
    "tile_tokens": st.integers(1, 12),
    "tile_vocab": st.integers(1, 50),
    "temperature": st.sampled_from([0.3, 1.0, 2.5]),
    "bias": st.booleans(),
    "data": st.data(),
}

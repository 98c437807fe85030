"""How bitsandbytes multiplies by a 4-bit weight on CUDA: one fused kernel, or dequantise first.

The fused kernel needs no memory beyond its result; the other way holds the whole weight in the
compute dtype meanwhile. bitsandbytes decides by architecture, number of multiprocessors and the
shape of the product, M rows by a weight of N x K. The thresholds were tuned by its authors, so
there is nothing to derive: this is their table, restated. `blocks` is N / 64, rounded up, and `sms`
the number of multiprocessors.

Source: bitsandbytes 0.50, backends/cuda/ops.py; tests/memory/test_rules.py compares the two over a
grid, where it is installed. Left out: ROCm.
"""

from __future__ import annotations

__all__ = ["is_fused"]

MOST_ROWS = 1536
SMALL_WEIGHT = 4 * 1024**2  # elements


def is_fused(
    capability: tuple[int, int],
    multiprocessors: int | None,
    dtype_name: str,
    rows: int,
    shape: tuple[int, int],
    blocksize: int,
) -> bool:
    """Whether x [rows, K] by a 4-bit weight of `shape` (N, K) runs without a dequantised copy.

    `dtype_name` of x: "float32", "float16" or "bfloat16". Without `multiprocessors`, a product that
    the table would have to look up counts as dequantised: it then never takes less than it is said
    to.
    """
    N, K = shape
    major = capability[0]
    if rows > MOST_ROWS or K % blocksize:
        return False
    if rows <= 4:
        return True
    turing_half = capability == (7, 5) and dtype_name == "float16"
    if dtype_name == "float32" or (major < 8 and not turing_half):
        return rows < 8
    if capability == (8, 7) or major == 11 or multiprocessors is None:
        return False
    blocks = (N + 63) // 64
    if major == 10:
        return rows <= _most_b200(blocks, multiprocessors, N, K)
    kind = _kind(capability)
    if N * K < SMALL_WEIGHT:
        return rows <= _most_small(kind, blocks, multiprocessors, N, K, rows)
    if rows > 512:
        return False
    if rows < 8:
        return _few(kind, blocks, multiprocessors, N, K, rows)
    return rows <= _MOST.get(kind, _most_ada)(blocks, multiprocessors, N, K)


def _kind(capability: tuple[int, int]) -> str:
    named = {(7, 5): "turing", (8, 0): "a100", (8, 6): "ampere", (12, 0): "blackwell"}
    if capability[0] == 9:
        return "hopper"
    return "gb10" if capability == (12, 1) else named.get(capability, "ada")


def _most_b200(blocks, sms, N, K) -> int:
    if blocks >= 3 * sms:
        return 32
    return 8 if blocks >= sms and K < N else 0


def _most_small(kind, blocks, sms, N, K, rows) -> int:
    """Weights under 4 Mi elements: dequantising costs more than the product."""
    if 2 * K < N:
        if kind in ("a100", "hopper"):
            low = 3 * blocks < sms
            return {"a100": (512, 1536), "hopper": (320, 512)}[kind][low]
        if kind == "turing":
            if blocks >= 3 * sms or K < 704:
                return 320
            return 64 if K >= 1024 else 96
        return 192 if blocks < sms and blocks * K > sms * 320 else 320
    quarter = 4 * blocks <= sms
    if kind == "a100" and quarter:
        if K < N:
            return 384
        return 32 if 8 * blocks <= sms else 128
    if kind == "turing" and blocks < sms and rows > 8:
        return 64
    if quarter:
        return 32 if K < N or kind in ("a100", "hopper") else 23
    return 16 if 2 * blocks <= sms else 0


def _few(kind, blocks, sms, N, K, rows) -> bool:
    """Five to seven rows: fused, but for some shapes on cards with HBM."""
    if kind not in ("a100", "hopper") or rows < 6 or blocks < (36 if kind == "hopper" else 48):
        return True
    under_60, under_75 = 5 * blocks < 3 * sms, 4 * blocks < 3 * sms
    if K > N:
        return not under_75
    if K < N:
        return True
    return not under_60 if kind == "a100" else under_60 or not under_75


def _most_turing(blocks, sms, N, K) -> int:
    if blocks >= 3 * sms:
        return 128 if K < N else 64
    return 64 if blocks >= sms // 2 else 32


def _most_a100(blocks, sms, N, K) -> int:
    if blocks >= 3 * sms:
        return 128
    if blocks >= sms:
        return 64 if K < N else 32
    if K >= 3 * N and 4 * blocks > sms:
        return 0
    if K == N and blocks >= 48 and 5 * blocks < 3 * sms:
        return 0
    if 2 * blocks < sms:
        if K <= N:
            return 128
        if 3 * blocks >= sms:
            return 0
    return 128 if blocks >= sms // 2 and K < N else 16


def _most_ampere(blocks, sms, N, K) -> int:
    if blocks >= sms:
        return 128
    return 64 if blocks >= sms // 2 else 16


def _most_hopper(blocks, sms, N, K) -> int:
    for waves, most in ((3, 64), (2, 48), (1, 32)):
        if blocks >= waves * sms:
            return most
    if blocks < sms // 2 or (K >= N and 4 * blocks < 3 * sms):
        return 0
    return 16


def _most_gb10(blocks, sms, N, K) -> int:
    return 256 if blocks >= sms else _most_ada(blocks, sms, N, K)


def _most_blackwell(blocks, sms, N, K) -> int:
    if blocks >= 3 * sms:
        return 256
    if blocks >= 2 * sms:
        return 128
    if 5 * blocks >= 4 * sms:
        return 96 if K >= N else 64
    if blocks >= sms // 2:
        return 64 if 2 * K >= N and blocks >= 128 else 8
    return 16 if K > 2 * N and blocks > 64 else 8


def _most_ada(blocks, sms, N, K) -> int:
    tall = K > 2 * N
    if blocks >= 3 * sms:
        return 256
    if blocks >= 2 * sms:
        return 128
    if 5 * blocks >= 4 * sms:
        if tall or blocks >= 200:
            return 128
        if K >= N:
            return 128 if sms >= 60 else 32
        return 64
    if blocks >= sms // 2:
        if tall:
            return 64
        return 8 if blocks >= 64 else 32
    if K > N and blocks <= 48:
        return 12 if K >= 3 * N else 10
    return 16 if tall or blocks < 48 else 8


_MOST = {
    "turing": _most_turing,
    "a100": _most_a100,
    "ampere": _most_ampere,
    "hopper": _most_hopper,
    "gb10": _most_gb10,
    "blackwell": _most_blackwell,
}

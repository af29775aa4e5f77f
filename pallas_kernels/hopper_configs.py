"""Which `Config` a product gets on Hopper: measured ones by shape, for the rest an estimate.

`tuned/hopper.json` holds what won when it was measured, by operation and M x N x K (rows of the
output, columns, reduction).
"""

import json
from functools import cache
from math import ceil
from pathlib import Path

import jax.numpy as jnp

from pallas_kernels.hopper_gemm import SMS, Config

# Speed of tiles that fill the chip, relative to the best: wide ones read less shared memory.
_WIDE = (
    (1.00, Config(columns=192)),
    (0.97, Config(columns=128, stages=5)),
    (0.85, Config(columns=64, stages=6)),
)
_FEW_ROWS = 128  # up to here weights are read once, and more tiles draw more bandwidth
# Float32 tiles of output leave room for this much, and scales of columns take more registers.
_FLOAT32 = Config(overlap=True, stages=4)


def dense(
    num_rows: int, num_columns: int, reduction: int, by_block: bool, out_dtype: jnp.dtype
) -> Config:
    """For M, N and K; `by_block`: the right operand has a scale a 128x128 block."""
    if by_block and _is_wide(out_dtype):
        return _FLOAT32
    operation = "fp8_matmul" if by_block else "fp8_matmul by tile"
    if tuned := _tuned(operation, num_rows, num_columns, reduction):
        return tuned
    if not by_block:
        return _FLOAT32
    if num_rows <= _FEW_ROWS:
        return _few_rows(num_rows, num_columns)

    def waves(choice):
        speed, config = choice
        tiles = ceil(num_rows / config.rows) * ceil(num_columns / config.columns)
        return ceil(tiles / SMS) * config.rows * config.columns / speed

    return min(_WIDE, key=waves)[1]


def grouped(num_columns: int, out_dtype: jnp.dtype) -> Config:
    """For N; the number of rows of a group is not known."""
    if _is_wide(out_dtype):
        return _FLOAT32

    wide, narrow = _WIDE[0][1], _WIDE[1][1]
    # When measured, wide tiles gained more here than `_WIDE` says.
    wasted = -num_columns % wide.columns / num_columns
    return wide if wasted < 0.08 else narrow


def masked(num_rows: int, num_columns: int, out_dtype: jnp.dtype) -> Config:
    """For M, the room of a group, and N."""
    if num_rows <= _FEW_ROWS and not _is_wide(out_dtype):
        return Config(warpgroups=1 if num_rows <= 64 else 2, stages=5)
    return grouped(num_columns, out_dtype)


def grouped_weight_gradient() -> Config:
    return _FLOAT32


def _is_wide(out_dtype):
    return jnp.dtype(out_dtype).itemsize > 2


def _few_rows(num_rows, num_columns):
    return Config(
        columns=32 if num_columns <= 32 * SMS else 64,
        warpgroups=1 if num_rows <= 64 else 2,
        stages=8,
        overlap=True,
    )


def _tuned(operation, *shape):
    fields = _table().get(operation, {}).get("x".join(map(str, shape)))
    return Config(**fields) if fields else None


@cache
def _table() -> dict[str, dict[str, dict]]:
    return json.loads((Path(__file__).parent / "tuned" / "hopper.json").read_text())

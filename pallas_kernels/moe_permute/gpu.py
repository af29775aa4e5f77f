"""Hopper, by the Triton back end of Pallas: one pass over memory each.

XLA gathers the messages, then copies codes and scales apart, then transposes the scales for the
products. Here a program reads the messages of a few slots as words of four codes and writes both
where products read them.

Letters beside `reference.py`'s: J slots or rows of a program, C columns (words of four codes).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quantize.reference import BLOCK

MAX_SIZE = 2**31 - 1  # elements: offsets are int32
WORD = 4  # codes


@dataclass(frozen=True)
class Config:
    """What a program holds; powers of two."""

    rows: int
    columns: int
    warps: int = 4


def permute_packed_rows_hopper(
    payload_RW: jax.Array,
    row_M: jax.Array,
    width: int,
    config: Config = Config(rows=8, columns=512),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `permute_packed_rows_reference`.

    Raises:
      NotImplementedError: no rows, too many, or a width that is no multiple of 128.
    """
    (R, W), M = payload_RW.shape, row_M.shape[0]
    if width % BLOCK:
        raise NotImplementedError(f"takes widths that are multiples of {BLOCK}, not {width}")
    if not 0 < R * W <= MAX_SIZE or not 0 < M * width <= MAX_SIZE:
        raise NotImplementedError(f"{R} rows, {M} slots of {width}; 1 to 2**31 - 1 codes")
    num_words, num_tiles = width // WORD, width // BLOCK
    words_RW = lax.bitcast_convert_type(payload_RW.reshape(R, W // WORD, WORD), jnp.int32)

    def kernel(words_RW, row_M, codes_MC, scales_TM):
        slot_J = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
        is_slot_J = slot_J < M
        row_J = plt.load(row_M.at[slot_J], mask=is_slot_J, other=R)
        full_J1 = (row_J < R)[:, None]

        def read(column_C, inside_C):
            mask_JC = full_J1 & inside_C[None]
            return plt.load(words_RW.at[row_J[:, None], column_C[None]], mask=mask_JC, other=0)

        def move(chunk, _):
            column_C = chunk * config.columns + jnp.arange(config.columns, dtype=jnp.int32)
            inside_C = column_C < num_words
            mask_JC = is_slot_J[:, None] & inside_C[None]
            at = slot_J[:, None], column_C[None]
            plt.store(codes_MC.at[at], read(column_C, inside_C), mask=mask_JC)

        lax.fori_loop(0, pl.cdiv(num_words, config.columns), move, None)
        tile_T = jnp.arange(pl.next_power_of_2(num_tiles), dtype=jnp.int32)
        is_tile_T = tile_T < num_tiles
        scale_JT = read(num_words + tile_T, is_tile_T)
        mask_JT = is_slot_J[:, None] & is_tile_T[None]
        plt.store(scales_TM.at[tile_T[None], slot_J[:, None]], scale_JT, mask=mask_JT)

    codes_MC, scales_TM = pl.pallas_call(
        kernel,
        out_shape=[
            jax.ShapeDtypeStruct((M, num_words), jnp.int32),
            jax.ShapeDtypeStruct((num_tiles, M), jnp.int32),
        ],
        grid=(pl.cdiv(M, config.rows),),
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        name="permute_packed_rows",
        interpret=interpret,
    )(words_RW, row_M)
    codes_MC4 = lax.bitcast_convert_type(codes_MC, jnp.float8_e4m3fn)
    return codes_MC4.reshape(M, width), lax.bitcast_convert_type(scales_TM, jnp.float32).T


def unpermute_sum_hopper(
    y_MD: jax.Array,
    slot_XK: jax.Array,
    config: Config = Config(rows=1, columns=1024),
    interpret: bool = False,
) -> jax.Array:
    """As `unpermute_sum_reference`.

    Raises:
      NotImplementedError: no matrix of floats, too narrow or too large, or no slots.
    """
    if y_MD.ndim != 2 or y_MD.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"takes a bfloat16 or float32 matrix, not {y_MD.dtype}")
    (M, D), (X, K) = y_MD.shape, slot_XK.shape
    if D % BLOCK or not 0 < M * D <= MAX_SIZE or not 0 < X * K:
        raise NotImplementedError(f"{X} sums of {K} slots of {M} x {D}; D a multiple of {BLOCK}")

    def kernel(y_MD, slot_XK, total_XD):
        row_J = pl.program_id(0) * config.rows + jnp.arange(config.rows, dtype=jnp.int32)
        column_C = pl.program_id(1) * config.columns
        column_C += jnp.arange(config.columns, dtype=jnp.int32)
        is_row_J, inside_C = row_J < X, column_C < D
        total_JC = jnp.zeros((config.rows, config.columns), jnp.float32)
        for k in range(K):
            slot_J = plt.load(slot_XK.at[row_J, k], mask=is_row_J, other=M)
            mask_JC = (slot_J < M)[:, None] & inside_C[None]
            at = slot_J[:, None], column_C[None]
            total_JC += plt.load(y_MD.at[at], mask=mask_JC, other=0).astype(jnp.float32)
        at, mask_JC = (row_J[:, None], column_C[None]), is_row_J[:, None] & inside_C[None]
        plt.store(total_XD.at[at], total_JC.astype(total_XD.dtype), mask=mask_JC)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((X, D), y_MD.dtype),
        grid=(pl.cdiv(X, config.rows), pl.cdiv(D, config.columns)),
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        name="unpermute_sum",
        interpret=interpret,
    )(y_MD, slot_XK)

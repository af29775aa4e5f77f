"""Hopper: the dense product, blocks or tiles of scales on the right; see `hopper_gemm`."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import hopper_configs
from pallas_kernels.hopper_gemm import Config, Tile, gemm, padded_to, prepare, row_and_column


def fp8_matmul_hopper(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    add_MN: jax.Array | None = None,
    config: Config | None = None,
    interpret=None,
) -> jax.Array:
    """As `fp8_matmul_reference`."""
    (M, K), N, T = q_MK.shape, len(q_NK), s_MT.shape[1]
    by_block = len(s_BT) != N
    config = config or hopper_configs.dense(M, N, K, by_block, out_dtype)
    operands = prepare(q_MK, s_MT.T, q_NK, s_BT[None] if by_block else s_BT.T, out_dtype)
    shape = len(operands[0]), len(operands[2])
    row_tiles, column_tiles = pl.cdiv(M, config.rows), pl.cdiv(N, config.columns)

    def locate(index):
        row, column = row_and_column(config, index, row_tiles, column_tiles)
        return Tile(row * config.rows, column * config.columns, jnp.int32(0), 0, jnp.int32(T))

    y_MN = gemm(
        config,
        operands,
        (),
        jax.ShapeDtypeStruct(shape, out_dtype),
        num_tiles=row_tiles * column_tiles,
        locate=locate,
        whole_iterations=T % config.unroll == 0,
        add=None if add_MN is None else padded_to(add_MN, shape),
        interpret=interpret,
    )
    return y_MN[:M, :N]

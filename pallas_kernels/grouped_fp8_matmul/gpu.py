"""Hopper: products of rows sorted by group; see `hopper_gemm`.

Rows are cut into tiles at fixed places. A tile that several groups share is visited once by each,
which writes its own rows alone.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import hopper_configs
from pallas_kernels.hopper_gemm import BLOCK, Config, Tile, gemm, padded_to, prepare, row_and_column

MAX_SIZE = 2**31 - 1  # results: rows that are stored one by one have int32 offsets


def grouped_fp8_matmul_hopper(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config | None = None,
    interpret=None,
) -> jax.Array:
    """As `grouped_fp8_matmul_reference`."""
    M, (G, N, _), T = len(q_MK), q_GNK.shape, s_MT.shape[1]
    config = config or hopper_configs.grouped(N, out_dtype)
    operands = prepare(q_MK, s_MT.T, q_GNK, s_GBT, out_dtype)
    shape = len(operands[0]), operands[2].shape[1]
    if shape[0] * shape[1] > MAX_SIZE:
        raise NotImplementedError(f"{shape[0]} x {shape[1]} results; at most 2**31 - 1")
    column_tiles = pl.cdiv(N, config.columns)
    # One more group: the rows after the last, which are zeros.
    sizes_H = jnp.append(group_sizes_G, shape[0] - jnp.sum(group_sizes_G)).astype(jnp.int32)
    end_H = jnp.cumsum(sizes_H, dtype=jnp.int32)
    begin_H = end_H - sizes_H
    first_tile_H = begin_H // config.rows
    visits_H = jnp.where(sizes_H > 0, pl.cdiv(end_H, config.rows) - first_tile_H, 0)
    last_visit_H = jnp.cumsum(visits_H, dtype=jnp.int32)
    num_visits = pl.cdiv(M, config.rows) + G
    visit_V = jnp.arange(num_visits, dtype=jnp.int32)
    group_V = jnp.sum(visit_V[:, None] >= last_visit_H, axis=1, dtype=jnp.int32)
    tile_V = visit_V + (first_tile_H - last_visit_H + visits_H).at[group_V].get(mode="clip")
    # Visits past the last have no group, and no rows of their own.
    begin_V, end_V = (x_H.at[group_V].get(mode="fill", fill_value=0) for x_H in (begin_H, end_H))

    def locate(group_V, tile_V, begin_V, end_V, index):
        visit, column = row_and_column(config, index, num_visits, column_tiles)
        group = group_V[visit]
        return Tile(
            tile_V[visit] * config.rows,
            column * config.columns,
            jnp.minimum(group, G - 1),
            0,
            lax.select(group < G, jnp.int32(T), jnp.int32(0)),
            own=(begin_V[visit], end_V[visit]),
        )

    y_MN = gemm(
        config,
        operands,
        (group_V, tile_V, begin_V, end_V),
        jax.ShapeDtypeStruct(shape, out_dtype),
        num_tiles=num_visits * column_tiles,
        locate=locate,
        whole_iterations=T % config.unroll == 0,
        interpret=interpret,
    )
    return y_MN[:M, :N]


def grouped_fp8_weight_gradient_hopper(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
    config: Config | None = None,
    interpret=None,
) -> jax.Array:
    """As `grouped_fp8_weight_gradient_reference`."""
    I, O, G = len(q_IM), len(q_OM), len(group_sizes_G)
    config = config or hopper_configs.grouped_weight_gradient()
    operands = prepare(q_IM, s_IR.T, q_OM, s_OR.T, jnp.float32)
    shape = len(operands[0]), len(operands[2])
    row_tiles, column_tiles = pl.cdiv(I, config.rows), pl.cdiv(O, config.columns)
    steps_G = group_sizes_G // BLOCK
    first_G = jnp.cumsum(steps_G, dtype=jnp.int32) - steps_G

    def locate(first_G, steps_G, index):
        group = lax.div(index, jnp.int32(row_tiles * column_tiles))
        in_group = lax.rem(index, jnp.int32(row_tiles * column_tiles))
        row, column = row_and_column(config, in_group, row_tiles, column_tiles)
        return Tile(
            row * config.rows, column * config.columns, group, first_G[group], steps_G[group]
        )

    dw_GIO = gemm(
        config,
        operands,
        (first_G, steps_G),
        jax.ShapeDtypeStruct((G, *shape), jnp.float32),
        num_tiles=G * row_tiles * column_tiles,
        locate=locate,
        whole_iterations=False,
        add=None if add_GIO is None else padded_to(add_GIO, shape),
        interpret=interpret,
    )
    return dw_GIO[:, :I, :O]


def masked_fp8_matmul_hopper(
    q_GMK: jax.Array,
    s_GMT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    num_rows_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config | None = None,
    interpret=None,
) -> jax.Array:
    """As `masked_fp8_matmul_reference`; tiles without a real row are not multiplied."""
    (G, M, T), N = s_GMT.shape, q_GNK.shape[1]
    config = config or hopper_configs.masked(M, N, out_dtype)
    operands = prepare(q_GMK, jnp.swapaxes(s_GMT, 1, 2), q_GNK, s_GBT, out_dtype)
    shape = operands[0].shape[1], operands[2].shape[1]
    row_tiles, column_tiles = pl.cdiv(M, config.rows), pl.cdiv(N, config.columns)

    def locate(num_rows_G, index):
        group = lax.div(index, jnp.int32(row_tiles * column_tiles))
        in_group = lax.rem(index, jnp.int32(row_tiles * column_tiles))
        row, column = row_and_column(config, in_group, row_tiles, column_tiles)
        row, num_rows = row * config.rows, num_rows_G[group]
        steps = lax.select(row < num_rows, jnp.int32(T), jnp.int32(0))
        return Tile(row, column * config.columns, group, 0, steps, limit=num_rows)

    y_GMN = gemm(
        config,
        operands,
        (num_rows_G,),
        jax.ShapeDtypeStruct((G, *shape), out_dtype),
        num_tiles=G * row_tiles * column_tiles,
        locate=locate,
        whole_iterations=T % config.unroll == 0,
        interpret=interpret,
    )
    return y_GMN[:, :M, :N]

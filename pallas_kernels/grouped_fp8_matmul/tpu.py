"""TPU: products of rows sorted by group, of a buffer a group, and weight gradients.

The first two are `tpu_gemm` with other visits. In the third, groups part the reduction: an output
tile of a group stays in memory while the steps that hold the group's rows are added to it.

Letters: as in `reference.py`, and V visits.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize.reference import BLOCK
from pallas_kernels.tpu_gemm import (
    DEFAULT,
    LANES,
    Config,
    Visits,
    add_products,
    block_of_lanes,
    by_step,
    gemm,
    multiple,
    of_rows,
    visits,
    whole_lanes,
)


def grouped_fp8_matmul_tpu(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """As `grouped_fp8_matmul_reference`."""
    M, (G, N, K) = q_MK.shape[0], q_GNK.shape
    if M * N * K * G == 0:
        return jnp.zeros((M, N), out_dtype)
    config = config.fitted(M, N)
    end_G = jnp.cumsum(group_sizes_G)
    # The rows after the last group are one more, which multiplies nothing.
    (tile_V, group_V, start_V, end_V), num_visits = visits(
        jnp.concatenate([end_G - group_sizes_G, end_G[-1:]]),
        jnp.append(end_G, M),
        config.rows,
        pl.cdiv(M, config.rows) + G,
    )
    end_V = jnp.where(group_V < G, end_V, 0)
    return gemm(
        config,
        (q_MK, s_MT, q_GNK, of_rows(s_GBT, N)),
        Visits(tile_V, jnp.minimum(group_V, G - 1), start_V, end_V),
        num_visits,
        jax.ShapeDtypeStruct((M, N), out_dtype),
        interpret=interpret,
    )


def masked_fp8_matmul_tpu(
    q_GMK: jax.Array,
    s_GMT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    num_rows_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """As `masked_fp8_matmul_reference`; tiles of rows that are not real cost nothing."""
    (G, M, K), N = q_GMK.shape, q_GNK.shape[1]
    if G * M * N * K == 0:
        return jnp.zeros((G, M, N), out_dtype)
    config = config.fitted(M, N)
    padded_M = multiple(M, config.rows)
    q_XK, s_XT = (
        jnp.pad(a, ((0, 0), (0, padded_M - M), (0, 0))).reshape(G * padded_M, -1)
        for a in (q_GMK, s_GMT)
    )
    tile_V = jnp.arange(G * padded_M // config.rows, dtype=jnp.int32)
    group_V, start_V = tile_V * config.rows // padded_M, tile_V * config.rows
    y_XN = gemm(
        config,
        (q_XK, s_XT, q_GNK, of_rows(s_GBT, N)),
        Visits(tile_V, group_V, start_V, group_V * padded_M + num_rows_G[group_V]),
        len(tile_V),
        jax.ShapeDtypeStruct((G * padded_M, N), out_dtype),
        interpret=interpret,
    )
    return y_XN.reshape(G, padded_M, N)[:, :M]


def grouped_fp8_weight_gradient_tpu(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> jax.Array:
    """As `grouped_fp8_weight_gradient_reference`."""
    (I, M), O, G = q_IM.shape, q_OM.shape[0], group_sizes_G.shape[0]
    if I * O * M * G == 0:
        return jnp.zeros((G, I, O), jnp.float32) if add_GIO is None else add_GIO
    config = config.fitted(I, O)
    rows, columns, depth = config.rows, config.columns, min(config.depth, multiple(M, BLOCK))
    steps = pl.cdiv(M, depth)
    end_G = jnp.cumsum(group_sizes_G)
    # Those of an empty group write its zeros.
    (step_V, *groups), num_visits = visits(
        end_G - group_sizes_G, end_G, depth, steps + G, visit_empty=True
    )
    step_V = jnp.minimum(step_V, steps - 1)

    def left(i, o, v, step_V, *_):
        return i, step_V[v]

    def left_scales(i, o, v, step_V, *_):
        return i, block_of_lanes(step_V[v], depth)

    def right(i, o, v, step_V, *_):
        return o, step_V[v]

    def right_scales(i, o, v, step_V, *_):
        return step_V[v], 0, o

    def output(i, o, v, step_V, group_V, *_):
        return group_V[v], i, o

    def kernel(step_V, group_V, start_V, end_V, q_a, s_a, q_b, s_b, *refs):
        *add, dw_IO = refs
        v = pl.program_id(2)

        @pl.when((v == 0) | (group_V[v] != group_V[jnp.maximum(v - 1, 0)]))
        def _():
            dw_IO[...] = add[0][...] if add else jnp.zeros_like(dw_IO)

        def in_group(tile):
            return (tile * BLOCK >= start_V[v]) & (tile * BLOCK < end_V[v])

        first = step_V[v] * (depth // BLOCK)
        add_products(dw_IO, q_a, s_a, q_b, s_b, first, config.code_dtype, in_group)

    in_specs = [
        pl.BlockSpec((rows, depth), left),
        pl.BlockSpec((rows, LANES), left_scales),
        pl.BlockSpec((columns, depth), right),
        pl.BlockSpec((None, depth // BLOCK, columns), right_scales),
    ]
    arrays = [q_IM, whole_lanes(s_IR), q_OM, by_step(of_rows(s_OR, O), depth)]
    if add_GIO is not None:
        in_specs.append(pl.BlockSpec((None, rows, columns), output))
        arrays.append(add_GIO)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((G, I, O), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(I, rows), pl.cdiv(O, columns), num_visits),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, rows, columns), output),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
    )(step_V, *groups, *arrays)

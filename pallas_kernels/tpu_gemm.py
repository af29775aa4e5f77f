"""The TPU kernel under the FP8 products, and what the weight gradient shares with it.

An output tile is visited once for every group that has rows in it; a visit streams its group's
weights along the reduction, adds the scaled partial product of every 128 to a float32 accumulator
(spec §5.2), and stores the rows that are its group's. The forms of the product differ in visits.

Letters: M rows, N columns, K reduction, T tiles of 128 along K, S steps of J tiles, G groups, V
visits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize.reference import BLOCK

LANES = 128  # of a vector register
SUBLANES = 32  # rows of FP8 codes in one
# Kinds of device whose matrix units multiply E4M3. Elsewhere codes are widened to bfloat16, which
# holds them and whose products are exact in float32.
FP8_UNITS = ("TPU7x",)


@dataclass(frozen=True)
class Config:
    """How a product is cut."""

    rows: int = 512  # of the output tile: a multiple of 128
    columns: int = 512  # a multiple of 128
    depth: int = 512  # of the reduction in a step: 128 times a power of two, at most 16384
    device_kind: str | None = None  # that it is compiled for; None: of the first device

    @property
    def code_dtype(self) -> jnp.dtype:
        """What the matrix units multiply."""
        kind = self.device_kind or jax.devices()[0].device_kind
        return jnp.float8_e4m3fn if kind in FP8_UNITS else jnp.bfloat16

    def fitted(self, rows: int, columns: int) -> "Config":
        """Tiles no larger than a small output."""
        return replace(
            self,
            rows=min(self.rows, multiple(rows, SUBLANES)),
            columns=min(self.columns, multiple(columns, LANES)),
        )


DEFAULT = Config()


class Visits(NamedTuple):
    """int32 arrays, an element a visit; those of one tile are consecutive."""

    tile_V: jax.Array  # of rows
    group_V: jax.Array
    start_V: jax.Array  # first of the group's rows
    end_V: jax.Array  # after its last; not above `start`: the visit multiplies nothing


def visits(
    start_G: jax.Array, end_G: jax.Array, rows: int, limit: int, visit_empty: bool = False
) -> tuple[Visits, jax.Array]:
    """Every tile of `rows` rows with every group that has rows in it, in order of the groups.

    Args:
      start_G, end_G: int32 bounds of the groups' rows, ascending.
      limit: at least as many as there are visits.
      visit_empty: an empty group is visited too, once.

    Returns:
      Arrays of `limit` elements, and how many are visits: the length of the grid.
    """
    first_G = start_G // rows
    count_G = jnp.where(end_G > start_G, pl.cdiv(end_G, rows) - first_G, int(visit_empty))
    stop_G = jnp.cumsum(count_G)
    visit_V = jnp.arange(limit, dtype=jnp.int32)
    group_V = jnp.minimum(jnp.sum(visit_V[:, None] >= stop_G, axis=1), len(end_G) - 1)
    tile_V = first_G[group_V] + visit_V - (stop_G - count_G)[group_V]
    arrays = (tile_V, group_V, start_G[group_V], end_G[group_V])
    return Visits(*(a.astype(jnp.int32) for a in arrays)), stop_G[-1]


def gemm(
    config: Config,
    operands: tuple[jax.Array, ...],
    visits: Visits,
    num_visits: jax.Array | int,
    out_type: jax.ShapeDtypeStruct,
    add_MN: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """y_MN: the rows of every visit times its group's weights; zeros in rows that none has.

    Args:
      operands: q_MK, s_MT, q_GNK and s_GTN: codes, and scales a row and 128 of the reduction.
      visits: of tiles of `config.rows`; every tile has one.
      add_MN: float32, added to the result; only where one group has all rows.

    Raises:
      NotImplementedError: a result in float16.
    """
    refuse_float16("the result", out_type.dtype)
    q_MK, s_MT, q_GNK, s_GTN = operands
    T = s_MT.shape[1]
    rows, columns, depth = config.rows, config.columns, min(config.depth, T * BLOCK)
    steps = pl.cdiv(T * BLOCK, depth)

    def step_of(v, s, start_V, end_V):
        """Without rows the operands of the last step stay, and nothing is copied."""
        return jnp.where(end_V[v] > start_V[v], s, steps - 1)

    def left(n, v, s, tile_V, group_V, start_V, end_V):
        return tile_V[v], step_of(v, s, start_V, end_V)

    def left_scales(n, v, s, tile_V, group_V, start_V, end_V):
        return tile_V[v], block_of_lanes(step_of(v, s, start_V, end_V), depth)

    def right(n, v, s, tile_V, group_V, start_V, end_V):
        return group_V[v], n, step_of(v, s, start_V, end_V)

    def right_scales(n, v, s, tile_V, group_V, start_V, end_V):
        return group_V[v], step_of(v, s, start_V, end_V), 0, n

    def output(n, v, s, tile_V, *_):
        return tile_V[v], n

    def kernel(tile_V, group_V, start_V, end_V, q_a, s_a, q_b, s_b, *refs):
        *add, y, sum_ref = refs
        v, s = pl.program_id(1), pl.program_id(2)
        tile, start, end = tile_V[v], start_V[v], end_V[v]

        @pl.when(end > start)
        def _():
            @pl.when(s == 0)
            def _():
                sum_ref[...] = jnp.zeros_like(sum_ref)

            first = s * (depth // BLOCK)
            within = None if T * BLOCK % depth == 0 else lambda t: t < T
            add_products(sum_ref, q_a, s_a, q_b, s_b, first, config.code_dtype, within)

        @pl.when(s == steps - 1)
        def _():
            @pl.when((v == 0) | (tile != tile_V[jnp.maximum(v - 1, 0)]))
            def _():
                y[...] = jnp.zeros_like(y)

            row = tile * rows + lax.broadcasted_iota(jnp.int32, y.shape, 0)
            total = add[0][...] + sum_ref[...] if add else sum_ref[...]
            inside = (row >= start) & (row < end)
            # Selected in 32 bits: masks of 16-bit values have another layout.
            y[...] = jnp.where(inside, total, y[...].astype(jnp.float32)).astype(y.dtype)

    in_specs = [
        pl.BlockSpec((rows, depth), left),
        pl.BlockSpec((rows, LANES), left_scales),
        pl.BlockSpec((None, columns, depth), right),
        pl.BlockSpec((None, None, depth // BLOCK, columns), right_scales),
    ]
    arrays = [whole_tiles(q_MK), whole_lanes(s_MT), whole_tiles(q_GNK), by_step(s_GTN, depth)]
    if add_MN is not None:
        in_specs.append(pl.BlockSpec((rows, columns), output))
        arrays.append(add_MN)
    return pl.pallas_call(
        kernel,
        out_shape=out_type,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(out_type.shape[1], columns), num_visits, steps),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((rows, columns), output),
            scratch_shapes=[pltpu.VMEM((rows, columns), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
    )(*visits, *arrays)


def add_products(
    sum_MN: jax.Ref,
    q_MD: jax.Ref,
    s_ML: jax.Ref,
    q_ND: jax.Ref,
    s_JN: jax.Ref,
    first: jax.Array,
    code_dtype: jnp.dtype,
    within: Callable[[jax.Array], jax.Array] | None,
) -> None:
    """Adds the scaled product of every tile of a step to the sum.

    Args:
      first: number of the step's first tile.
      within: whether a tile counts, by its number; None: all do.
    """

    scales_ML = rolled(s_ML, first)

    def add(j):
        tile = slice(j * BLOCK, (j + 1) * BLOCK)
        # A default of the user's for products of float32 must not reach these.
        partial_MN = lax.dot_general(
            q_MD[:, tile].astype(code_dtype),
            q_ND[:, tile].astype(code_dtype),
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        sum_MN[...] += partial_MN * (scales_ML[:, j : j + 1] * s_JN[j : j + 1, :])

    for j in range(q_MD.shape[1] // BLOCK):
        if within is None:
            add(j)
        else:
            pl.when(within(first + j))(lambda j=j: add(j))


def rolled(s_ML: jax.Ref, tile: jax.Array) -> jax.Array:
    """A block of the scales of 128 tiles, that of number `tile` first."""
    return pltpu.roll(s_ML[...], -tile & (LANES - 1), 1)


def block_of_lanes(step: jax.Array, depth: int) -> jax.Array:
    """Which block of the scales of 128 tiles holds those of a step."""
    return lax.div(step * depth, BLOCK * LANES)


def whole_tiles(q_K: jax.Array) -> jax.Array:
    """Codes [..., K], K filled with zeros up to a multiple of 128."""
    missing = -q_K.shape[-1] % BLOCK
    return jnp.pad(q_K, [(0, 0)] * (q_K.ndim - 1) + [(0, missing)]) if missing else q_K


def whole_lanes(s_MT: jax.Array) -> jax.Array:
    """Scales [M, T], T filled with zeros up to a multiple of 128, as they lie in memory anyway."""
    return jnp.pad(s_MT, ((0, 0), (0, -s_MT.shape[1] % LANES)))


def by_step(s_TN: jax.Array, depth: int) -> jax.Array:
    """Scales [..., T, N] as [..., S, J, N], the last step filled with zeros."""
    *groups, T, N = s_TN.shape
    J = depth // BLOCK
    s_TN = jnp.pad(s_TN, [(0, 0)] * len(groups) + [(0, -T % J), (0, 0)])
    return s_TN.reshape(*groups, -1, J, N)


def of_rows(s_GBT: jax.Array, N: int) -> jax.Array:
    """Scales of blocks [..., ceil(N / 128), T] or of rows [..., N, T], as [..., T, N]."""
    if s_GBT.shape[-2] != N:
        s_GBT = jnp.repeat(s_GBT, BLOCK, axis=-2)[..., :N, :]
    return jnp.swapaxes(s_GBT, -1, -2)


def refuse_float16(name: str, dtype: jnp.dtype) -> None:
    """Mosaic has no registers of float16.

    Raises:
      NotImplementedError: it is asked for.
    """
    if dtype == jnp.float16:
        raise NotImplementedError(f"{name} is float16; TPU kernels take bfloat16 and float32")


def multiple(length: int, step: int) -> int:
    """The next multiple of `step`."""
    return pl.cdiv(length, step) * step

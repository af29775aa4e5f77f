"""The Hopper kernel under every FP8 product: persistent, warp-specialised, promoted every 128.

One warp moves tiles into shared memory; each of the other warpgroups multiplies 64 rows of the
output tile by the tensor cores, 128 of the reduction at a time, and adds the scaled partial product
to its float32 registers (spec §5.2). The forms of the product share the body and differ in
`locate`: where a tile lies, and which part of the reduction it needs.

Letters: M rows, N columns, K reduction, T tiles of 128 along K, G groups, B blocks of 128 along N;
C columns of a chunk.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import wgmma
from pallas_kernels.hopper_store import store_pairs

BLOCK = 128  # the reduction between two promotions, and a side of a weight block
SMS = 132  # streaming multiprocessors of H100 and H200
LINE = 32  # float32 of the 128 bytes that the copy engine aligns to in shared memory
# Registers a thread: the mover needs few, the others share what it leaves.
MOVER_REGISTERS = 40
MULTIPLIER_REGISTERS = {2: 232, 3: 152}


@dataclass(frozen=True)
class Config:
    """How a product is cut. The output tile is 64 * warpgroups x columns."""

    columns: int = 128  # a multiple of 16, of 32 where columns have scales of their own
    warpgroups: int = 2  # that multiply
    stages: int = 4  # steps of the reduction in flight
    unroll: int = 2  # steps of the reduction in one iteration of the loop
    overlap: bool = False  # promote a step while the tensor cores run the next of the iteration
    snake: int = 8  # tiles side by side that share operands in L2
    snake_columns: bool = False  # they lie along the columns of the output, not along the rows

    @property
    def rows(self) -> int:
        return wgmma.ROWS * self.warpgroups


class Tile(NamedTuple):
    """Where a tile lies: int32 scalars."""

    row: jax.Array  # first row of the left operand, and of the output
    column: jax.Array  # first column of the output
    group: jax.Array | int
    first: jax.Array | int  # tile of 128 along K where its reduction starts
    steps: jax.Array | int  # tiles of 128 in it; 0: the output is zeros
    limit: jax.Array | None = None  # rows from here on are zeros in the output; None: none
    own: tuple[jax.Array, jax.Array] | None = None  # only rows from.. to.. are written; None: all


def row_and_column(
    config: Config, index: jax.Array, row_tiles: int, column_tiles: int
) -> tuple[jax.Array, jax.Array]:
    """Of output tile number `index`, in an order that keeps operands in L2."""
    shape, dim = (row_tiles, column_tiles), int(config.snake_columns)
    return plgpu.planar_snake(index, shape, dim, config.snake)


def prepare(
    a: jax.Array, sa: jax.Array, b: jax.Array, sb: jax.Array, out_dtype: jnp.dtype
) -> tuple[jax.Array, ...]:
    """The operands of `gemm`, with zeros up to the whole tiles that the copy engine moves.

    Returns:
      a, sa, b, sb; a product of them has rows and columns to be cut off again.

    Raises:
      NotImplementedError: another GPU, or nothing to multiply.
    """
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        raise NotImplementedError("runs on compute capability 9.0 (Hopper) alone")
    if a.size == 0 or b.size == 0:
        raise NotImplementedError("there is nothing to multiply")
    columns = 128 // jnp.dtype(out_dtype).itemsize
    return (
        _padded(a, 8, BLOCK),
        _padded(sa, 1, 8),
        _padded(b, columns, BLOCK),
        _padded(sb, 1, 4 if sb.ndim == 3 else columns),
    )


def _padded(x: jax.Array, *multiples: int) -> jax.Array:
    """Zeros at the ends of the last dims, up to multiples."""
    sizes = x.shape[-len(multiples) :]
    return padded_to(x, tuple(n + -n % m for n, m in zip(sizes, multiples, strict=True)))


def padded_to(x: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Zeros at the ends of the last dims, up to sizes."""
    padding = [(0, size - n) for n, size in zip(x.shape[-len(sizes) :], sizes, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - len(sizes)) + padding)


def gemm(
    config: Config,
    operands: tuple[jax.Array, ...],
    tables: tuple[jax.Array, ...],
    out_type: jax.ShapeDtypeStruct,
    *,
    num_tiles: int,
    locate: Callable[..., Tile],
    whole_iterations: bool,
    add: jax.Array | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Runs the kernel.

    Args:
      operands: a [(G,) M, K] E4M3, sa [(G,) T, M] float32, b [(G,) N, K] E4M3, and its scales sb:
        [G, B, T] float32 for blocks of 128x128, or [T, N] for tiles of 1x128.
      tables: int32 arrays that `locate` reads.
      num_tiles: of the output.
      locate: (*tables, index) -> Tile of output tile number `index`.
      whole_iterations: the steps of every tile are a multiple of `config.unroll`.
      add: float32, of the output's shape: added to the result.
      interpret: parameters of the interpreter, which stands in for the tensor cores.

    Raises:
      NotImplementedError: jax before 0.11, which cannot lower the kernel.
    """
    if interpret is None and jax.__version_info__ < (0, 11):
        raise NotImplementedError("needs jax 0.11 or newer")
    a, sa, b, sb = operands
    by_block = sb.ndim == 3
    rows, columns = config.rows, config.columns
    assert columns % (16 if by_block else LINE) == 0, config
    chunk = gcd(columns, BLOCK) if by_block else columns  # columns that share a scale
    chunks = [pl.ds(start, chunk) for start in range(0, columns, chunk)]
    # A tile that starts at a multiple of the chunk reaches into so many blocks of the weight.
    span = (BLOCK - chunk + columns - 1) // BLOCK + 1
    out_bits = jnp.dtype(out_type.dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * out_bits)
    out_layout = (
        plgpu.TilingTransform((8, swizzle * 8 // out_bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    stages, warpgroups = config.stages, config.warpgroups
    scratch = {
        "a_smem": plgpu.SMEM((stages, rows, BLOCK), a.dtype, transforms=wgmma.OPERAND_LAYOUT),
        "b_smem": plgpu.SMEM((stages, columns, BLOCK), b.dtype, transforms=wgmma.OPERAND_LAYOUT),
        "sa_smem": plgpu.SMEM((stages, rows), jnp.float32),
        "sb_smem": plgpu.SMEM(
            (2, span, pl.cdiv(sb.shape[-1], LINE) * LINE) if by_block else (stages, columns),
            jnp.float32,
        ),
        "out_smem": plgpu.SMEM(
            (warpgroups, wgmma.ROWS, columns), out_type.dtype, transforms=out_layout
        ),
        "full": plgpu.Barrier(num_arrivals=3 if by_block else 4, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        "scales_full": plgpu.Barrier(num_arrivals=1, num_barriers=2),
        "scales_free": plgpu.Barrier(num_arrivals=warpgroups, num_barriers=2),
        "add_full": plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups),
    }

    def of_group(ref, group):
        return ref.at[group] if len(ref.shape) == 3 else ref

    def layout_cast(x, layout):
        return x if interpret else plgpu.layout_cast(x, layout)

    def index_in(x_MC, dim):
        index_MC = lax.broadcasted_iota(jnp.int32, x_MC.shape, dim)
        return layout_cast(index_MC, plgpu.Layout.WGMMA)

    def next_slot(slot):
        return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)

    def wait_for_all(barrier, arrivals, slots):
        """The last arrivals at slots that were used in turn."""
        oldest = jnp.maximum(arrivals - slots, 0)

        @pl.loop(oldest, arrivals)
        def _(arrival):
            plgpu.barrier_wait(barrier.at[lax.rem(arrival, jnp.int32(slots))])

    def kernel(a, sa, b, sb, *refs):
        tables_refs, (*add_ref, out) = refs[: len(tables)], refs[len(tables) :]

        def each_tile(body):
            # The carry is the steps done and the next slot: stages run on across output tiles.
            @plgpu.nd_loop(
                (num_tiles,), collective_axes="sm", init_carry=(jnp.int32(0), jnp.int32(0))
            )
            def carry(loop, carry):
                return body(locate(*tables_refs, loop.index[0]), loop.local_index, *carry)

            return carry

        def move(a_smem, b_smem, sa_smem, sb_smem, full, free, scales_full, scales_free, **_):
            def one_tile(tile, index, done, slot):
                tile_rows, tile_columns = pl.ds(tile.row, rows), pl.ds(tile.column, columns)
                if by_block:
                    scales_slot = lax.rem(index, jnp.int32(2))
                    pl.when(index >= 2)(lambda: plgpu.barrier_wait(scales_free.at[scales_slot]))
                    blocks = pl.ds(lax.div(tile.column, jnp.int32(BLOCK)), span)
                    # A dynamic start: the slice may reach past the array, where it reads zeros.
                    source = sb.at[tile.group, blocks, pl.ds(index * 0, sb_smem.shape[-1])]
                    plgpu.copy_gmem_to_smem(
                        source, sb_smem.at[scales_slot], scales_full.at[scales_slot]
                    )

                def step(k, carry):
                    done, slot = carry
                    pl.when(done >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    t = tile.first + k
                    depth = pl.ds(t * BLOCK, BLOCK)
                    copies = [
                        (of_group(a, tile.group).at[tile_rows, depth], a_smem),
                        (of_group(b, tile.group).at[tile_columns, depth], b_smem),
                        (of_group(sa, tile.group).at[t, tile_rows], sa_smem),
                    ]
                    if not by_block:
                        copies.append((sb.at[t, tile_columns], sb_smem))
                    for source, target in copies:
                        plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])
                    return done + 1, next_slot(slot)

                return lax.fori_loop(0, tile.steps, step, (done, slot))

            done, slot = each_tile(one_tile)
            # No barrier is left with an arrival that nobody has seen.
            tiles = lax.div(num_tiles - lax.axis_index("sm") + SMS - 1, SMS)
            wait_for_all(free, done, stages)
            if by_block:
                wait_for_all(scales_free, tiles, 2)

        def multiply(
            a_smem,
            b_smem,
            sa_smem,
            sb_smem,
            out_smem,
            full,
            free,
            scales_full,
            scales_free,
            add_full,
        ):
            warpgroup = lax.axis_index("wg")
            own_rows = pl.ds(warpgroup * wgmma.ROWS, wgmma.ROWS)

            def one_tile(tile, index, done, slot):
                scales_slot = lax.rem(index, jnp.int32(2))
                if by_block:
                    plgpu.barrier_wait(scales_full.at[scales_slot])

                def issue(slot):
                    plgpu.barrier_wait(full.at[slot])
                    if interpret:
                        return lax.dot_general(
                            a_smem[slot, own_rows].astype(jnp.float32),
                            b_smem[slot].astype(jnp.float32),
                            (((1,), (1,)), ((), ())),
                        )
                    return wgmma.issue(columns)(a_smem.at[slot, own_rows], b_smem.at[slot])

                def scale_of(c, t):
                    """Of a chunk of columns in step t."""
                    if columns % BLOCK == 0:  # tiles start where blocks do
                        block = c.start // BLOCK
                    else:
                        start = lax.rem(tile.column, jnp.int32(BLOCK)) + c.start
                        block = lax.div(start, jnp.int32(BLOCK))
                    return sb_smem[scales_slot, block, t]

                def scales(slot, t):
                    """Vectors of the rows and (by tile) of the columns; scalars of the chunks."""
                    sa_M = layout_cast(sa_smem[slot, own_rows], plgpu.Layout.WGMMA.reduce(1))
                    if by_block:
                        return sa_M, [scale_of(c, t) for c in chunks]
                    by_column = plgpu.Layout.WGMMA.reduce(0)
                    return sa_M, [layout_cast(sb_smem[slot, c], by_column) for c in chunks]

                def promote(sums, partial_MN, sa_M, sb_chunks):
                    shape = (wgmma.ROWS, chunk)
                    promoted = []
                    for sum_MC, c, sb in zip(sums, chunks, sb_chunks, strict=True):
                        partial_MC = partial_MN[:, c.start : c.start + chunk]
                        s_M = sa_M
                        if by_block:
                            s_M = sa_M * sb
                        else:
                            partial_MC *= lax.broadcast_in_dim(sb, shape, [1])
                        promoted.append(sum_MC + partial_MC * lax.broadcast_in_dim(s_M, shape, [0]))
                    return tuple(promoted)

                def run(steps, sums):
                    """Multiplies and promotes the steps (k, slot) of one iteration."""
                    later = config.overlap and len(steps) > 1
                    issued = []
                    for i, (k, slot) in enumerate(steps):
                        issued.append(issue(slot))
                        if not later:
                            sums = finish(issued.pop(), 0, k, slot, sums)
                        elif i:
                            sums = finish(issued.pop(0), 1, *steps[i - 1], sums)
                    return finish(issued.pop(), 0, *steps[-1], sums) if later else sums

                def finish(partial_MN, pending, k, slot, sums):
                    step_scales = scales(slot, tile.first + k)
                    if not interpret:
                        partial_MN = wgmma.settle(columns, pending)(partial_MN)
                    plgpu.barrier_arrive(free.at[slot])
                    return promote(sums, partial_MN, *step_scales)

                def iterations(count, size, carry):
                    def one(_, carry):
                        k, slot, sums = carry
                        steps = []
                        for u in range(size):
                            steps.append((k + u, slot))
                            slot = next_slot(slot)
                        return k + size, slot, run(steps, sums)

                    return lax.fori_loop(0, count, one, carry)

                zeros = jnp.zeros((wgmma.ROWS, chunk), jnp.float32)
                sums = tuple(layout_cast(zeros, plgpu.Layout.WGMMA) for _ in chunks)
                unroll = jnp.int32(config.unroll)
                carry = (jnp.int32(0), slot, sums)
                carry = iterations(lax.div(tile.steps, unroll), config.unroll, carry)
                if not whole_iterations:
                    carry = iterations(lax.rem(tile.steps, unroll), 1, carry)
                _, slot, sums = carry
                if by_block:
                    plgpu.barrier_arrive(scales_free.at[scales_slot])
                store(tile, sums)
                return done + tile.steps, slot

            def store(tile, sums):
                first_row = tile.row + warpgroup * wgmma.ROWS
                out_here = of_group(out, tile.group)
                store_part = interpret_store_own if interpret else store_own
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                if tile.own is None:
                    return store_all(tile, sums, first_row, out_here)
                begin, end = tile.own
                is_whole = (begin <= first_row) & (first_row + wgmma.ROWS <= end)
                pl.when(is_whole)(lambda: store_all(tile, sums, first_row, out_here))

                pl.when(jnp.logical_not(is_whole))(
                    lambda: store_part(begin, end, tile, sums, first_row, out_here)
                )

            def store_own(begin, end, tile, sums, first_row, out_here):
                width = out.shape[-1]
                for c, sum_MC in zip(chunks, sums, strict=True):
                    row_MC = index_in(sum_MC, 0) + first_row
                    column_MC = index_in(sum_MC, 1) + (tile.column + c.start)
                    inside_MC = (begin <= row_MC) & (row_MC < end) & (column_MC < width)
                    offset_MC = jnp.where(inside_MC, row_MC * width + column_MC, -1)
                    store_pairs(out_here, sum_MC.astype(out.dtype), offset_MC)

            def interpret_store_own(begin, end, tile, sums, first_row, out_here):
                own_out = out_smem.at[warpgroup]
                for c, sum_MC in zip(chunks, sums, strict=True):
                    own_out[:, c] = sum_MC.astype(out.dtype)

                @pl.loop(
                    jnp.maximum(begin - first_row, 0), jnp.clip(end - first_row, 0, wgmma.ROWS)
                )
                def _(row):
                    target = (pl.ds(first_row + row, 1), pl.ds(tile.column, columns))
                    plgpu.copy_smem_to_gmem(own_out.at[pl.ds(row, 1)], out_here.at[target])

            def store_all(tile, sums, first_row, out_here):
                own_out = out_smem.at[warpgroup]
                target = (pl.ds(first_row, wgmma.ROWS), pl.ds(tile.column, columns))
                if add is not None:
                    source = of_group(add_ref[0], tile.group).at[target]
                    plgpu.copy_gmem_to_smem(source, own_out, add_full.at[warpgroup])
                    plgpu.barrier_wait(add_full.at[warpgroup])
                for c, sum_MC in zip(chunks, sums, strict=True):
                    if add is not None:
                        sum_MC += own_out[:, c]
                    if tile.limit is not None:
                        inside_MC = index_in(sum_MC, 0) + first_row < tile.limit
                        sum_MC = jnp.where(inside_MC, sum_MC, jnp.zeros_like(sum_MC))
                    own_out[:, c] = sum_MC.astype(out.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_out, out_here.at[target])

            each_tile(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def threads(**memory):
            is_mover = lax.axis_index("wg") == warpgroups

            @pl.when(is_mover)
            def _():
                if interpret:
                    return move(**memory)
                plgpu.set_max_registers(MOVER_REGISTERS, action="decrease")

                # One warp: the others would only repeat its instructions.
                @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
                def _():
                    pl.when(lax.axis_index("warp") == 0)(lambda: move(**memory))

            @pl.when(jnp.logical_not(is_mover))
            def _():
                if warpgroups in MULTIPLIER_REGISTERS and not interpret:
                    registers = MULTIPLIER_REGISTERS[warpgroups]
                    plgpu.set_max_registers(registers, action="increase")
                multiply(**memory)

        pl.run_scoped(threads, collective_axes="wg", **scratch)

    kernel.__name__ = "fp8_product"  # in profiles
    options = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(SMS,),
        grid_names=("sm",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Barriers and copies are ordered by hand: what a warpgroup writes to shared memory it
            # commits before a copy, and it waits for that copy before it writes again.
            unsafe_no_auto_barriers=True,
        ),
        **options,
    )(a, sa, b, sb, *tables, *(() if add is None else (add,)))

"""What the three Hopper kernels share: tiles and their order, products, masks, barriers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

SMS = 132  # streaming multiprocessors of H100 and H200
ROWS = 64  # of a warpgroup
WARPGROUPS = 2  # that compute; one more moves
TILE = ROWS * WARPGROUPS
LOG2E = math.log2(math.e)
MASKED = -1e30  # a score nobody sees: finite, so that a block without visible keys makes no NaN
MOVER_REGISTERS, COMPUTE_REGISTERS = 24, 240
# How bfloat16 operands of the tensor cores lie in shared memory: lines of 128 bytes, swizzled.
OPERAND_LAYOUT = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


def operand(*shape: int):
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=OPERAND_LAYOUT)


@dataclass(frozen=True)
class Order:
    """Of tiles: heads in groups whose operands fit in L2, in a group the longest tiles first."""

    num_batches: int
    num_heads: int
    num_tiles: int  # along the tokens
    longest_last: bool  # the tile at the end of the tokens has most to do
    group_heads: int = 8

    @property
    def count(self) -> int:
        return self.num_batches * self.num_heads * self.num_tiles

    def locate(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(batch, head, tile along the tokens) of tile number `index`."""
        group_heads = math.gcd(self.group_heads, self.num_heads)
        group, rest = divide(index, group_heads * self.num_tiles)
        tile, head = divide(rest, group_heads)
        batch, head = divide(group * group_heads + head, self.num_heads)
        return batch, head, self.num_tiles - 1 - tile if self.longest_last else tile


def divide(a, b):
    """Quotient and remainder of int32 scalars that are not negative."""
    b = jnp.int32(b)
    return lax.div(a, b), lax.rem(a, b)


class Ops:
    """Products and layouts, for the chip or for the interpreter, which has no accumulators."""

    def __init__(self, interpret: Any):
        self.interpret = interpret

    def cast(self, x, layout):
        return x if self.interpret else plgpu.layout_cast(x, layout)

    def zeros(self, *shape):
        return self.cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)

    def per_row(self, x_Q):
        return self.cast(x_Q, plgpu.Layout.WGMMA.reduce(1))

    def per_column(self, x_K):
        return self.cast(x_K, plgpu.Layout.WGMMA.reduce(0))

    def index(self, shape, dim):
        return self.cast(lax.broadcasted_iota(jnp.int32, shape, dim), plgpu.Layout.WGMMA)

    def multiply(self, sums: list, products: list[tuple[int, Any, Any]], use: Callable):
        """Starts products and runs `use(read)` while they are computed.

        Args:
          sums: what is added to, [rows, columns] float32; a shape: zeros.
          products: (index of the sum, left, right), in the order in which they finish.
          use: `read(i, pending)` is sum i as soon as at most `pending` later products are running.
        """
        if self.interpret:
            values = [jnp.zeros(x, jnp.float32) if isinstance(x, tuple) else x for x in sums]
            for i, left, right in products:
                left, right = (x if isinstance(x, jax.Array) else x[...] for x in (left, right))
                values[i] += jnp.dot(left.astype(jnp.float32), right.astype(jnp.float32))
            return use(lambda i, pending: values[i])

        def run(*accumulators):
            for accumulator, start in zip(accumulators, sums, strict=True):
                if not isinstance(start, tuple):
                    accumulator[...] = start
            for i, left, right in products:
                plgpu.wgmma(accumulators[i], left, right)
            return use(
                lambda i, pending: plgpu.wgmma_accumulator_load(accumulators[i], wait_n=pending)
            )

        shapes = [x if isinstance(x, tuple) else x.shape for x in sums]
        return pl.run_scoped(run, *[plgpu.ACC(shape, jnp.float32) for shape in shapes])


def document_ends(starts_BT: jax.Array) -> jax.Array:
    """One past the last token of every token's document: int32 [B, T]."""
    T = starts_BT.shape[1]
    index_BT = lax.broadcasted_iota(jnp.int32, starts_BT.shape, 1)
    is_last_BT = jnp.roll(starts_BT, -1, axis=1) != starts_BT
    ends_BT = jnp.where(is_last_BT & (index_BT < T - 1), index_BT + 1, T)
    return lax.cummin(ends_BT, axis=1, reverse=True)


def next_slot(slot: jax.Array, stages: int) -> jax.Array:
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def transposed(ref):
    return ref.transpose((1, 0))


def wait_for_rest(barrier, arrivals, slots):
    """The last arrivals at slots that were used in turn: no barrier is left with an unseen one."""

    @pl.loop(jnp.maximum(arrivals - slots, 0), arrivals)
    def _(arrival):
        plgpu.barrier_wait(barrier.at[lax.rem(arrival, jnp.int32(slots))])


def launch(
    name: str,
    body_move: Callable,
    body_compute: Callable,
    scratch: dict,
    operands: tuple,
    out_types: tuple,
    num_programs: int,
    interpret: Any,
    reduction_scratch_bytes: int = 2048,
    registers: tuple[int, ...] | None = None,
    moves_together: bool = False,
) -> list[jax.Array]:
    """Runs `num_programs` (axis "program"): a warp does `body_move`, warpgroups `body_compute`.

    Profiles show the kernel under `name`. `reduction_scratch_bytes` of shared memory are for sums
    across warps; those along a row of a product need none.
    They take (operands, memory) and (operands, outputs, memory): references, and those of `scratch`
    by name.

    Args:
      registers: of a thread that moves, and of each warpgroup that computes; `body_compute` then
        takes the warpgroup's number too. None: the same for all that compute.
      moves_together: a warpgroup does `body_move`, not a warp.
    """
    mover_registers, *compute_registers = registers or (MOVER_REGISTERS, COMPUTE_REGISTERS)

    def kernel(*refs):
        inputs, outputs = refs[: len(operands)], refs[len(operands) :]

        def threads(**memory):
            is_mover = lax.axis_index("wg") == WARPGROUPS

            @pl.when(is_mover)
            def _():
                if interpret:
                    return body_move(inputs, memory)
                plgpu.set_max_registers(mover_registers, action="decrease")
                if moves_together:
                    return body_move(inputs, memory)

                @pl.core_map(plgpu.WarpMesh(axis_name="warp"))
                def _():
                    pl.when(lax.axis_index("warp") == 0)(lambda: body_move(inputs, memory))

            def compute(*warpgroup):
                if not interpret:
                    count = compute_registers[sum(warpgroup)]
                    plgpu.set_max_registers(count, action="increase")
                body_compute(inputs, outputs, memory, *warpgroup)

            if registers is None:
                return pl.when(jnp.logical_not(is_mover))(compute)
            for warpgroup in range(WARPGROUPS):
                pl.when(lax.axis_index("wg") == warpgroup)(lambda i=warpgroup: compute(i))

        pl.run_scoped(threads, collective_axes="wg", **scratch)

    kernel.__name__ = name
    options = {} if interpret is None else {"interpret": interpret}
    return plgpu.kernel(
        kernel,
        out_type=list(out_types),
        grid=(num_programs,),
        grid_names=("program",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=reduction_scratch_bytes,
            # Barriers and copies are ordered by hand, as in hopper_gemm.
            unsafe_no_auto_barriers=True,
        ),
        **options,
    )(*operands)

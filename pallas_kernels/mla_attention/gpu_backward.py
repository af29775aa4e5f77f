"""Hopper kernel of the backward pass: gradients of queries; `gpu_backward_keys.py` has the others.

All compute the scores again: so nothing is added up in memory, and results do not differ between
runs. A program has one tile: a loop over tiles would hold registers that there are not. `delta` is
the sum over a row of do * o.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import common
from pallas_kernels.mla_attention.common import LOG2E, ROWS, TILE, WARPGROUPS, operand


@dataclass(frozen=True)
class Config:
    block: int = 64  # tokens of the side that streams past
    stages: int = 3  # such blocks in flight
    group_heads: int = 8  # whose operands share L2


def query_gradients(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    do_BTNH: jax.Array,
    lse_BNT: jax.Array,
    delta_BNT: jax.Array,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """dq_nope_BTNP and dq_rope_BTNR, bfloat16."""
    B, T, N, P = q_nope_BTNP.shape
    R, H = q_rope_BTNR.shape[-1], v_BTNH.shape[-1]
    block, stages, shape = config.block, config.stages, (ROWS, config.block)
    order = common.Order(B, N, T // TILE, longest_last=True, group_heads=config.group_heads)
    ops = common.Ops(interpret)
    operands = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    operands += (do_BTNH, lse_BNT * LOG2E, delta_BNT)  # of exp2
    if starts_BT is not None:
        operands += (starts_BT,)
    scratch = {
        "q_nope": operand(WARPGROUPS, ROWS, P),
        "q_rope": operand(WARPGROUPS, ROWS, R),
        "do": operand(WARPGROUPS, ROWS, H),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "delta": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "starts": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
        "k_nope": operand(stages, block, P),
        "k_rope": operand(stages, block, R),
        "v": operand(stages, block, H),
        "own_full": plgpu.Barrier(num_arrivals=len(operands) - 3, num_barriers=WARPGROUPS),
        "full": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def own_tile(starts, body):
        """body(batch, head, first query, first and last block of keys, 0) -> blocks done."""
        batch, head, tile = order.locate(lax.axis_index("program"))
        query = tile * TILE
        first = lax.div(starts[0][batch, query], jnp.int32(block)) if starts else jnp.int32(0)
        return body(batch, head, query, first, pl.cdiv(query + TILE, block), jnp.int32(0))

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def move(inputs, memory):
        _, _, k_nope, k_rope, v, _, _, _, *starts = inputs

        def one_tile(batch, head, query, first, end, done):
            def step(index, done):
                slot, rows = slot_of(done), pl.ds(index * block, block)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
                for name, source in (
                    ("k_nope", k_nope.at[batch, rows, head]),
                    ("k_rope", k_rope.at[batch, rows]),
                    ("v", v.at[batch, rows, head]),
                ):
                    full = memory["full"].at[slot]
                    plgpu.copy_gmem_to_smem(source, memory[name].at[slot], full)
                return done + 1

            return lax.fori_loop(first, end, step, done)

        done = own_tile(starts, one_tile)
        common.wait_for_rest(memory["free"], done, stages)

    def compute(inputs, outputs, memory):
        q_nope, q_rope, _, _, _, do, lse, delta, *starts = inputs
        warpgroup = lax.axis_index("wg")
        names = ("q_nope", "q_rope", "do", "lse", "delta", "starts")
        own = {name: memory[name].at[warpgroup] for name in names}
        own_full = memory["own_full"].at[warpgroup]

        def one_tile(batch, head, query, first, end, slot):
            own_query = query + warpgroup * ROWS
            rows = pl.ds(own_query, ROWS)
            sources = {
                "q_nope": q_nope.at[batch, rows, head],
                "q_rope": q_rope.at[batch, rows, head],
                "do": do.at[batch, rows, head],
                "lse": lse.at[batch, head, rows],
                "delta": delta.at[batch, head, rows],
            }
            if starts:
                sources["starts"] = starts[0].at[batch, rows]
            for name, source in sources.items():
                plgpu.copy_gmem_to_smem(source, own[name], own_full)
            plgpu.barrier_wait(own_full)
            lse_Q = ops.per_row(own["lse"][...])
            delta_Q = ops.per_row(own["delta"][...])

            def score_products(slot):
                """Sum 0: scores; sum 1: the gradients of the weights."""
                plgpu.barrier_wait(memory["full"].at[slot])
                k_nope, k_rope, v = (memory[x].at[slot] for x in ("k_nope", "k_rope", "v"))
                return [
                    (0, own["q_nope"], common.transposed(k_nope)),
                    (0, own["q_rope"], common.transposed(k_rope)),
                    (1, own["do"], common.transposed(v)),
                ]

            def visible(index):
                row_QK = ops.index(shape, 0) + own_query
                column_QK = ops.index(shape, 1) + index * block
                visible_QK = column_QK <= row_QK
                if starts:
                    starts_Q = ops.per_row(own["starts"][...])
                    visible_QK &= column_QK >= lax.broadcast_in_dim(starts_Q, shape, [0])
                return visible_QK

            def score_gradients(read, pending, visible_QK):
                """ds_QK in float32, where `pending` products come after the two."""
                s_QK = read(0, pending + 1) * (scale * LOG2E)
                p_QK = jnp.exp2(s_QK - lax.broadcast_in_dim(lse_Q, shape, [0]))
                if visible_QK is not None:
                    p_QK = jnp.where(visible_QK, p_QK, 0.0)
                return p_QK * (read(1, pending) - lax.broadcast_in_dim(delta_Q, shape, [0]))

            def first_block(read):
                ds_QK = score_gradients(read, 0, visible(first))
                return lax.optimization_barrier(ds_QK.astype(jnp.bfloat16))

            ds_QK = ops.multiply([shape, shape], score_products(slot), first_block)

            def gradient_products(slot, ds_QK, i):
                return [
                    (i, ds_QK, memory["k_nope"].at[slot]),
                    (i + 1, ds_QK, memory["k_rope"].at[slot]),
                ]

            def step(index, carry, masked):
                """Scores of a block, and the gradients from the block before it."""
                ds_QK, dq_QP, dq_QR, slot = carry
                next_slot = common.next_slot(slot, stages)

                def use(read):
                    next_QK = score_gradients(read, 2, visible(index) if masked else None)
                    # Not sooner to bfloat16: the tensor cores still read the registers of ds_QK.
                    next_QK, dq_QP, dq_QR = lax.optimization_barrier(
                        (next_QK, read(2, 0), read(3, 0))
                    )
                    plgpu.barrier_arrive(memory["free"].at[slot])
                    return lax.optimization_barrier(next_QK.astype(jnp.bfloat16)), dq_QP, dq_QR

                products = score_products(next_slot) + gradient_products(slot, ds_QK, 2)
                return (*ops.multiply([shape, shape, dq_QP, dq_QR], products, use), next_slot)

            carry = (ds_QK, ops.zeros(ROWS, P), ops.zeros(ROWS, R), slot)
            whole = lax.div(query, jnp.int32(block))  # blocks before the diagonal
            carry = lax.fori_loop(first + 1, whole, lambda i, c: step(i, c, bool(starts)), carry)
            carry = lax.fori_loop(
                jnp.maximum(whole, first + 1), end, lambda i, c: step(i, c, True), carry
            )
            ds_QK, dq_QP, dq_QR, slot = carry
            dq_QP, dq_QR = ops.multiply(
                [dq_QP, dq_QR],
                gradient_products(slot, ds_QK, 0),
                lambda read: (read(0, 0), read(1, 0)),
            )
            plgpu.barrier_arrive(memory["free"].at[slot])

            plgpu.commit_smem()  # every warp is done with the queries
            own["q_nope"][...] = (dq_QP * scale).astype(jnp.bfloat16)
            own["q_rope"][...] = (dq_QR * scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for name, out in zip(("q_nope", "q_rope"), outputs, strict=True):
                plgpu.copy_smem_to_gmem(own[name], out.at[batch, rows, head])
            return slot

        own_tile(starts, one_tile)
        plgpu.wait_smem_to_gmem(0)

    out_types = tuple(
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q_nope_BTNP, q_rope_BTNR)
    )
    return tuple(
        common.launch(
            "mla_query_gradients",
            move,
            compute,
            scratch,
            operands,
            out_types,
            order.count,
            interpret,
        )
    )

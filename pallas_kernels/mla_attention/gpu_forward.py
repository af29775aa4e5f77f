"""Hopper kernel of the forward pass: 128 queries of a head at a time, online softmax.

Two warpgroups have 64 queries each. The product with the values of one block of keys runs while the
scores of the next become weights.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import common
from pallas_kernels.mla_attention.common import LOG2E, MASKED, ROWS, TILE, WARPGROUPS, operand


@dataclass(frozen=True)
class Config:
    keys: int = 128  # of a block
    stages: int = 2  # blocks of keys and values in flight
    group_heads: int = 8  # whose keys and values share L2


def forward(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    config: Config = Config(),
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As the reference, for bfloat16 and whole tiles of tokens."""
    B, T, N, P = q_nope_BTNP.shape
    R, H = q_rope_BTNR.shape[-1], v_BTNH.shape[-1]
    assert T % TILE == 0 and T % config.keys == 0 and P == H
    keys, stages, to_log2 = config.keys, config.stages, scale * LOG2E
    order = common.Order(B, N, T // TILE, longest_last=True, group_heads=config.group_heads)
    ops = common.Ops(interpret)
    operands = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    if starts_BT is not None:
        operands += (starts_BT,)
    scratch = {
        "q_nope": operand(WARPGROUPS, ROWS, P),
        "q_rope": operand(WARPGROUPS, ROWS, R),
        "k_nope": operand(stages, keys, P),
        "k_rope": operand(stages, keys, R),
        "v": operand(stages, keys, H),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "starts": plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32),
        "q_full": plgpu.Barrier(
            num_arrivals=2 if starts_BT is None else 3, num_barriers=WARPGROUPS
        ),
        "k_full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_full": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def each_tile(starts, body):
        """body(batch, head, first query, first and last block of keys, done) -> done."""

        @plgpu.nd_loop((order.count,), collective_axes="program", init_carry=jnp.int32(0))
        def done(loop, carry):
            batch, head, tile = order.locate(loop.index[0])
            query = tile * TILE
            first = lax.div(starts[0][batch, query], jnp.int32(keys)) if starts else jnp.int32(0)
            return body(batch, head, query, first, pl.cdiv(query + TILE, keys), carry)

        return done

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def move(inputs, memory):
        _, _, k_nope, k_rope, v, *starts = inputs

        def one_tile(batch, head, query, first, end, done):
            def step(block, done):
                slot, rows = slot_of(done), pl.ds(block * keys, keys)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["k_free"].at[slot]))
                full = memory["k_full"].at[slot]
                plgpu.copy_gmem_to_smem(
                    k_nope.at[batch, rows, head], memory["k_nope"].at[slot], full
                )
                plgpu.copy_gmem_to_smem(k_rope.at[batch, rows], memory["k_rope"].at[slot], full)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["v_free"].at[slot]))
                plgpu.copy_gmem_to_smem(
                    v.at[batch, rows, head], memory["v"].at[slot], memory["v_full"].at[slot]
                )
                return done + 1

            return lax.fori_loop(first, end, step, done)

        done = each_tile(starts, one_tile)
        common.wait_for_rest(memory["k_free"], done, stages)
        common.wait_for_rest(memory["v_free"], done, stages)

    def compute(inputs, outputs, memory):
        q_nope, q_rope, _, _, _, *starts = inputs
        out, lse_out = outputs
        warpgroup = lax.axis_index("wg")
        own = {name: memory[name].at[warpgroup] for name in ("q_nope", "q_rope", "lse", "starts")}
        q_full = memory["q_full"].at[warpgroup]

        def one_tile(batch, head, query, first, end, slot):
            own_query = query + warpgroup * ROWS
            rows = pl.ds(own_query, ROWS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's output
            plgpu.copy_gmem_to_smem(q_nope.at[batch, rows, head], own["q_nope"], q_full)
            plgpu.copy_gmem_to_smem(q_rope.at[batch, rows, head], own["q_rope"], q_full)
            if starts:
                plgpu.copy_gmem_to_smem(starts[0].at[batch, rows], own["starts"], q_full)
            plgpu.barrier_wait(q_full)

            def score_products(slot):
                plgpu.barrier_wait(memory["k_full"].at[slot])
                return [
                    (0, own["q_nope"], common.transposed(memory["k_nope"].at[slot])),
                    (0, own["q_rope"], common.transposed(memory["k_rope"].at[slot])),
                ]

            def visible(block):
                row_QK = ops.index((ROWS, keys), 0) + own_query
                column_QK = ops.index((ROWS, keys), 1) + block * keys
                visible_QK = column_QK <= row_QK
                if starts:
                    starts_Q = ops.per_row(own["starts"][...])
                    visible_QK &= column_QK >= lax.broadcast_in_dim(starts_Q, (ROWS, keys), [0])
                return visible_QK

            def weights(s_QK, visible_QK, maximum_Q):
                """exp(s - maximum) with the maximum so far, and the factor of what was summed."""
                if visible_QK is not None:
                    s_QK = jnp.where(visible_QK, s_QK, MASKED)
                new_Q = jnp.maximum(maximum_Q, s_QK.max(axis=1) * to_log2)
                p_QK = jnp.exp2(s_QK * to_log2 - lax.broadcast_in_dim(new_Q, s_QK.shape, [0]))
                if visible_QK is not None:  # of a row that sees nothing here, p is anything
                    p_QK = jnp.where(visible_QK, p_QK, 0.0)
                return p_QK, new_Q, jnp.exp2(maximum_Q - new_Q)

            def first_block(read):
                s_QK = read(0, 0)
                plgpu.barrier_arrive(memory["k_free"].at[slot])
                start_Q = ops.per_row(jnp.full((ROWS,), MASKED, jnp.float32))
                p_QK, maximum_Q, _ = weights(s_QK, visible(first), start_Q)
                return (
                    lax.optimization_barrier(p_QK.astype(jnp.bfloat16)),
                    maximum_Q,
                    p_QK.sum(axis=1),
                )

            p_QK, maximum_Q, sum_Q = ops.multiply([(ROWS, keys)], score_products(slot), first_block)

            def step(block, carry, masked):
                """Scores of `block`, and the values of the block before it."""
                p_QK, maximum_Q, sum_Q, o_QH, slot = carry
                next_slot = common.next_slot(slot, stages)

                def use(read):
                    s_QK = read(0, 1)
                    plgpu.barrier_arrive(memory["k_free"].at[next_slot])
                    visible_QK = visible(block) if masked else None
                    next_QK, new_Q, factor_Q = weights(s_QK, visible_QK, maximum_Q)
                    new_sum_Q = sum_Q * factor_Q + next_QK.sum(axis=1)
                    # Not sooner: the tensor cores still read the registers of the weights before.
                    next_QK, o_QH = lax.optimization_barrier((next_QK, read(1, 0)))
                    next_QK = lax.optimization_barrier(next_QK.astype(jnp.bfloat16))
                    plgpu.barrier_arrive(memory["v_free"].at[slot])
                    o_QH *= lax.broadcast_in_dim(factor_Q, o_QH.shape, [0])
                    return next_QK, new_Q, new_sum_Q, o_QH

                plgpu.barrier_wait(memory["v_full"].at[slot])
                products = [*score_products(next_slot), (1, p_QK, memory["v"].at[slot])]
                return (*ops.multiply([(ROWS, keys), o_QH], products, use), next_slot)

            carry = (p_QK, maximum_Q, sum_Q, ops.zeros(ROWS, H), slot)
            whole = lax.div(query, jnp.int32(keys))  # blocks before the diagonal
            carry = lax.fori_loop(first + 1, whole, lambda i, c: step(i, c, bool(starts)), carry)
            carry = lax.fori_loop(
                jnp.maximum(whole, first + 1), end, lambda i, c: step(i, c, True), carry
            )
            p_QK, maximum_Q, sum_Q, o_QH, slot = carry
            plgpu.barrier_wait(memory["v_full"].at[slot])
            o_QH = ops.multiply([o_QH], [(0, p_QK, memory["v"].at[slot])], lambda read: read(0, 0))
            plgpu.barrier_arrive(memory["v_free"].at[slot])

            plgpu.commit_smem()  # every warp is done with the queries
            o_QH *= lax.broadcast_in_dim(1 / sum_Q, o_QH.shape, [0])
            own["q_nope"][...] = o_QH.astype(jnp.bfloat16)
            own["lse"][...] = maximum_Q / LOG2E + jnp.log(sum_Q)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own["q_nope"], out.at[batch, rows, head])
            plgpu.copy_smem_to_gmem(own["lse"], lse_out.at[batch, head, rows])
            return common.next_slot(slot, stages)

        each_tile(starts, one_tile)
        plgpu.wait_smem_to_gmem(0)

    out_types = (
        jax.ShapeDtypeStruct(v_BTNH.shape, v_BTNH.dtype),
        jax.ShapeDtypeStruct((B, N, T), jnp.float32),
    )
    o_BTNH, lse_BNT = common.launch(
        "mla_forward", move, compute, scratch, operands, out_types, common.SMS, interpret
    )
    return o_BTNH, lse_BNT

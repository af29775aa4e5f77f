"""Hopper kernels of the backward pass: one for gradients of queries, one for keys and values.

Both compute the scores again: so nothing is added up in memory, and results do not differ between
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


def key_gradients(
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dk_nope_BTNP, dk_rope_BTNR (of every head: their sum is the gradient), dv_BTNH; bfloat16."""
    B, T, N, P = q_nope_BTNP.shape
    R, H = q_rope_BTNR.shape[-1], v_BTNH.shape[-1]
    block, stages, shape = config.block, config.stages, (ROWS, config.block)
    order = common.Order(B, N, T // TILE, longest_last=False, group_heads=config.group_heads)
    ops = common.Ops(interpret)
    operands = (k_nope_BTNP, k_rope_BTR, v_BTNH)
    operands += (q_nope_BTNP, q_rope_BTNR, do_BTNH, lse_BNT * LOG2E, delta_BNT)  # of exp2
    if starts_BT is not None:
        operands += (starts_BT, common.document_ends(starts_BT))
    scratch = {
        "k_nope": operand(WARPGROUPS, ROWS, P),
        "k_rope": operand(WARPGROUPS, ROWS, R),
        "v": operand(WARPGROUPS, ROWS, H),
        "weights": operand(WARPGROUPS, ROWS, block),  # then their gradients
        "q_nope": operand(stages, block, P),
        "q_rope": operand(stages, block, R),
        "do": operand(stages, block, H),
        "lse": plgpu.SMEM((stages, block), jnp.float32),
        "delta": plgpu.SMEM((stages, block), jnp.float32),
        "starts": plgpu.SMEM((stages, block), jnp.int32),
        "own_full": plgpu.Barrier(num_arrivals=3, num_barriers=WARPGROUPS),
        "full": plgpu.Barrier(num_arrivals=5 if starts_BT is None else 6, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def own_tile(documents, body):
        """body(batch, head, first key, first and last block of queries, 0) -> blocks done."""
        batch, head, tile = order.locate(lax.axis_index("program"))
        key = tile * TILE
        end = documents[1][batch, key + TILE - 1] if documents else jnp.int32(T)
        return body(batch, head, key, lax.div(key, block), pl.cdiv(end, block), jnp.int32(0))

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def move(inputs, memory):
        _, _, _, q_nope, q_rope, do, lse, delta, *documents = inputs

        def one_tile(batch, head, key, first, end, done):
            def step(index, done):
                slot, rows = slot_of(done), pl.ds(index * block, block)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
                sources = {
                    "q_nope": q_nope.at[batch, rows, head],
                    "q_rope": q_rope.at[batch, rows, head],
                    "lse": lse.at[batch, head, rows],
                    "do": do.at[batch, rows, head],
                    "delta": delta.at[batch, head, rows],
                }
                if documents:
                    sources["starts"] = documents[0].at[batch, rows]
                for name, source in sources.items():
                    full = memory["full"].at[slot]
                    plgpu.copy_gmem_to_smem(source, memory[name].at[slot], full)
                return done + 1

            return lax.fori_loop(first, end, step, done)

        done = own_tile(documents, one_tile)
        common.wait_for_rest(memory["free"], done, stages)

    def compute(inputs, outputs, memory):
        k_nope, k_rope, v, _, _, _, _, _, *documents = inputs
        warpgroup = lax.axis_index("wg")
        own = {name: memory[name].at[warpgroup] for name in ("k_nope", "k_rope", "v", "weights")}
        own_full = memory["own_full"].at[warpgroup]

        def one_tile(batch, head, key, first, end, slot):
            own_key = key + warpgroup * ROWS
            rows = pl.ds(own_key, ROWS)
            plgpu.copy_gmem_to_smem(k_nope.at[batch, rows, head], own["k_nope"], own_full)
            plgpu.copy_gmem_to_smem(k_rope.at[batch, rows], own["k_rope"], own_full)
            plgpu.copy_gmem_to_smem(v.at[batch, rows, head], own["v"], own_full)
            plgpu.barrier_wait(own_full)

            def block_of(slot):
                names = ("q_nope", "q_rope", "do", "lse", "delta", "starts")
                return {name: memory[name].at[slot] for name in names}

            def weights(read, pending, here, index, masked):
                """p_KQ in float32, where `pending` products come after the scores."""
                s_KQ = read(0, pending) * (scale * LOG2E)
                lse_Q = ops.per_column(here["lse"][...])
                p_KQ = jnp.exp2(s_KQ - lax.broadcast_in_dim(lse_Q, shape, [1]))
                if not masked:
                    return p_KQ
                row_KQ = ops.index(shape, 0) + own_key
                visible_KQ = row_KQ <= ops.index(shape, 1) + index * block
                if documents:
                    starts_Q = ops.per_column(here["starts"][...])
                    visible_KQ &= row_KQ >= lax.broadcast_in_dim(starts_Q, shape, [1])
                return jnp.where(visible_KQ, p_KQ, 0.0)

            def score_products(here):
                return [
                    (0, own["k_nope"], common.transposed(here["q_nope"])),
                    (0, own["k_rope"], common.transposed(here["q_rope"])),
                ]

            def share(x_KQ):
                """To the tensor cores by shared memory: registers are short."""
                plgpu.commit_smem()  # they, and every warp, are done with what was there
                own["weights"][...] = x_KQ.astype(jnp.bfloat16)
                plgpu.commit_smem()

            def gradient_products(here, i):
                return [
                    (i, own["weights"], here["q_nope"]),
                    (i + 1, own["weights"], here["q_rope"]),
                ]

            def value_gradients(here, dv_KH):
                """ds_KQ, and dv_KH with the block's part: the tensor cores add while ds forms."""

                def use(read):
                    p_KQ = ops.cast(own["weights"][...], plgpu.Layout.WGMMA).astype(jnp.float32)
                    delta_Q = ops.per_column(here["delta"][...])
                    dp_KQ = read(0, 1) - lax.broadcast_in_dim(delta_Q, shape, [1])
                    return lax.optimization_barrier((p_KQ * dp_KQ, read(1, 0)))

                products = [
                    (0, own["v"], common.transposed(here["do"])),
                    (1, own["weights"], here["do"]),
                ]
                return ops.multiply([shape, dv_KH], products, use)

            here = block_of(slot)
            plgpu.barrier_wait(memory["full"].at[slot])
            share(
                ops.multiply(
                    [shape], score_products(here), lambda read: weights(read, 0, here, first, True)
                )
            )
            ds_KQ, dv_KH = value_gradients(here, ops.zeros(ROWS, H))
            share(ds_KQ)

            def step(index, carry, masked):
                """Scores and values of a block, and the keys' gradients from the block before."""
                dk_KP, dk_KR, dv_KH, slot = carry
                next_slot = common.next_slot(slot, stages)
                before, here = block_of(slot), block_of(next_slot)
                plgpu.barrier_wait(memory["full"].at[next_slot])

                def use(read):
                    p_KQ = weights(read, 2, here, index, masked)
                    return lax.optimization_barrier((p_KQ, read(1, 0), read(2, 0)))

                products = score_products(here) + gradient_products(before, 1)
                p_KQ, dk_KP, dk_KR = ops.multiply([shape, dk_KP, dk_KR], products, use)
                plgpu.barrier_arrive(memory["free"].at[slot])
                share(p_KQ)
                ds_KQ, dv_KH = value_gradients(here, dv_KH)
                share(ds_KQ)
                return dk_KP, dk_KR, dv_KH, next_slot

            carry = (ops.zeros(ROWS, P), ops.zeros(ROWS, R), dv_KH, slot)
            diagonal = jnp.minimum(first + TILE // block, end)
            carry = lax.fori_loop(first + 1, diagonal, lambda i, c: step(i, c, True), carry)
            carry = lax.fori_loop(diagonal, end, lambda i, c: step(i, c, bool(documents)), carry)
            dk_KP, dk_KR, dv_KH, slot = carry
            dk_KP, dk_KR = ops.multiply(
                [dk_KP, dk_KR],
                gradient_products(block_of(slot), 0),
                lambda read: (read(0, 0), read(1, 0)),
            )
            plgpu.barrier_arrive(memory["free"].at[slot])

            plgpu.commit_smem()  # every warp is done with the keys
            own["k_nope"][...] = (dk_KP * scale).astype(jnp.bfloat16)
            own["k_rope"][...] = (dk_KR * scale).astype(jnp.bfloat16)
            own["v"][...] = dv_KH.astype(jnp.bfloat16)
            plgpu.commit_smem()
            for name, out in zip(("k_nope", "k_rope", "v"), outputs, strict=True):
                plgpu.copy_smem_to_gmem(own[name], out.at[batch, rows, head])
            return slot

        own_tile(documents, one_tile)
        plgpu.wait_smem_to_gmem(0)

    out_types = tuple(
        jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (k_nope_BTNP, q_rope_BTNR, v_BTNH)
    )
    return tuple(
        common.launch(
            "mla_key_gradients", move, compute, scratch, operands, out_types, order.count, interpret
        )
    )

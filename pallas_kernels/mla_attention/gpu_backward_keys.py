"""Hopper kernels of the backward pass: gradients of keys, and of values.

Two kernels, though each computes the scores again: the sums of both, 320 numbers a key, leave no
registers for the weights, which would have to pass through shared memory, and the tensor cores
wait for that. Scores are transposed: [keys, queries].
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
from pallas_kernels.mla_attention.gpu_backward import Config

DEFAULT = Config()


@dataclass(frozen=True)
class _Gradient:
    """What a kernel adds up over queries: weights, or their gradients, times an operand."""

    name: str
    own: tuple[str, ...]  # of the keys
    streamed: tuple[str, ...]  # of the queries
    summed: tuple[str, ...]  # of the streamed ones
    outputs: tuple[str, ...]  # whose gradients they are
    of_scores: bool  # the weights' gradients, before the softmax, and not the weights


_KEYS = _Gradient(
    name="mla_key_gradients",
    own=("k_nope", "k_rope", "v"),
    streamed=("q_nope", "q_rope", "do", "lse", "delta"),
    summed=("q_nope", "q_rope"),
    outputs=("k_nope", "k_rope"),
    of_scores=True,
)
_VALUES = _Gradient(
    name="mla_value_gradients",
    own=("k_nope", "k_rope"),
    streamed=("q_nope", "q_rope", "do", "lse"),
    summed=("do",),
    outputs=("v",),
    of_scores=False,
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
    config: Config = DEFAULT,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """dk_nope_BTNP and dk_rope_BTNR (of every head: their sum is the gradient), bfloat16."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    rest = (starts_BT, scale, do_BTNH, lse_BNT, delta_BNT)
    return tuple(_gradients(_KEYS, *inputs, *rest, config, interpret))


def value_gradients(
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
    config: Config = DEFAULT,
    interpret: Any = None,
) -> jax.Array:
    """dv_BTNH, bfloat16; `delta_BNT` is not used."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    rest = (starts_BT, scale, do_BTNH, lse_BNT, delta_BNT)
    (dv_BTNH,) = _gradients(_VALUES, *inputs, *rest, config, interpret)
    return dv_BTNH


def _gradients(
    gradient, q_nope, q_rope, k_nope, k_rope, v, starts, scale, do, lse, delta, config, interpret
) -> list[jax.Array]:
    B, T, N, _ = q_nope.shape
    block, stages, shape = config.block, config.stages, (ROWS, config.block)
    order = common.Order(B, N, T // TILE, longest_last=False, group_heads=config.group_heads)
    ops = common.Ops(interpret)
    arrays = {"q_nope": q_nope, "q_rope": q_rope, "k_nope": k_nope, "k_rope": k_rope, "v": v}
    arrays |= {"do": do, "lse": lse * LOG2E, "delta": delta}  # lse of exp2
    names = (*gradient.own, *gradient.streamed)
    operands = tuple(arrays[name] for name in names)
    if starts is not None:
        operands += (starts, common.document_ends(starts))
    num_streamed = len(gradient.streamed) + (starts is not None)
    scratch = {
        **{name: operand(WARPGROUPS, ROWS, arrays[name].shape[-1]) for name in gradient.own},
        **{
            name: operand(stages, block, arrays[name].shape[-1])
            if arrays[name].ndim == 4
            else plgpu.SMEM((stages, block), jnp.float32)
            for name in gradient.streamed
        },
        # The keys' memory is theirs until the end, and what comes out may have another width.
        **{
            f"d_{name}": operand(WARPGROUPS, ROWS, arrays[name].shape[-1])
            for name in gradient.outputs
            if name not in gradient.own
        },
        "starts": plgpu.SMEM((stages, block), jnp.int32),
        "own_full": plgpu.Barrier(num_arrivals=len(gradient.own), num_barriers=WARPGROUPS),
        "full": plgpu.Barrier(num_arrivals=num_streamed, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }

    def split(inputs):
        """The arrays by name, and the documents' starts and ends, if there are any."""
        return dict(zip(names, inputs, strict=False)), inputs[len(names) :]

    def own_tile(documents, body):
        """body(batch, head, first key, first and last block of queries, 0) -> blocks done."""
        batch, head, tile = order.locate(lax.axis_index("program"))
        key = tile * TILE
        end = documents[1][batch, key + TILE - 1] if documents else jnp.int32(T)
        return body(batch, head, key, lax.div(key, block), pl.cdiv(end, block), jnp.int32(0))

    def slot_of(step):
        return lax.rem(step, jnp.int32(stages))

    def move(inputs, memory):
        given, documents = split(inputs)

        def one_tile(batch, head, key, first, end, done):
            def step(index, done):
                slot, rows = slot_of(done), pl.ds(index * block, block)
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
                sources = {
                    name: given[name].at[batch, head, rows]
                    if name in ("lse", "delta")
                    else given[name].at[batch, rows, head]
                    for name in gradient.streamed
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
        given, documents = split(inputs)
        warpgroup = lax.axis_index("wg")
        own = {name: memory[name].at[warpgroup] for name in gradient.own}
        own_full = memory["own_full"].at[warpgroup]

        def one_tile(batch, head, key, first, end, slot):
            own_key = key + warpgroup * ROWS
            rows = pl.ds(own_key, ROWS)
            for name in gradient.own:
                source = given[name]
                source = (
                    source.at[batch, rows] if name == "k_rope" else source.at[batch, rows, head]
                )
                plgpu.copy_gmem_to_smem(source, own[name], own_full)
            plgpu.barrier_wait(own_full)

            def block_of(slot):
                return {name: memory[name].at[slot] for name in (*gradient.streamed, "starts")}

            def score_products(here):
                """Sum 0: scores; for the keys also sum 1: the gradients of the weights."""
                products = [
                    (0, own["k_nope"], common.transposed(here["q_nope"])),
                    (0, own["k_rope"], common.transposed(here["q_rope"])),
                ]
                if gradient.of_scores:
                    products.append((1, own["v"], common.transposed(here["do"])))
                return products

            num_scores = 2 if gradient.of_scores else 1

            def gradient_products(here, a_KQ, i):
                return [(i + j, a_KQ, here[name]) for j, name in enumerate(gradient.summed)]

            def factors(read, pending, here, index, masked):
                """What is summed over queries, float32, where `pending` products come after."""
                s_KQ = read(0, pending + num_scores - 1) * (scale * LOG2E)
                lse_Q = ops.per_column(here["lse"][...])
                p_KQ = jnp.exp2(s_KQ - lax.broadcast_in_dim(lse_Q, shape, [1]))
                if masked:
                    row_KQ = ops.index(shape, 0) + own_key
                    visible_KQ = row_KQ <= ops.index(shape, 1) + index * block
                    if documents:
                        starts_Q = ops.per_column(here["starts"][...])
                        visible_KQ &= row_KQ >= lax.broadcast_in_dim(starts_Q, shape, [1])
                    p_KQ = jnp.where(visible_KQ, p_KQ, 0.0)
                if not gradient.of_scores:
                    return p_KQ
                delta_Q = ops.per_column(here["delta"][...])
                return p_KQ * (read(1, pending) - lax.broadcast_in_dim(delta_Q, shape, [1]))

            def low(a_KQ):
                return lax.optimization_barrier(a_KQ.astype(jnp.bfloat16))

            here = block_of(slot)
            plgpu.barrier_wait(memory["full"].at[slot])
            a_KQ = ops.multiply(
                [shape] * num_scores,
                score_products(here),
                lambda read: low(factors(read, 0, here, first, True)),
            )

            def step(index, carry, masked):
                """Scores of a block, and the sums of the block before it."""
                a_KQ, *sums, slot = carry
                next_slot = common.next_slot(slot, stages)
                before, here = block_of(slot), block_of(next_slot)
                plgpu.barrier_wait(memory["full"].at[next_slot])

                def use(read):
                    next_KQ = factors(read, len(sums), here, index, masked)
                    # Not sooner to bfloat16: the tensor cores still read the registers of a_KQ.
                    next_KQ, *added = lax.optimization_barrier(
                        (next_KQ, *(read(num_scores + i, 0) for i in range(len(sums))))
                    )
                    plgpu.barrier_arrive(memory["free"].at[slot])
                    return low(next_KQ), *added

                products = score_products(here) + gradient_products(before, a_KQ, num_scores)
                return *ops.multiply([shape] * num_scores + sums, products, use), next_slot

            widths = [arrays[name].shape[-1] for name in gradient.summed]
            carry = (a_KQ, *(ops.zeros(ROWS, width) for width in widths), slot)
            diagonal = jnp.minimum(first + TILE // block, end)
            carry = lax.fori_loop(first + 1, diagonal, lambda i, c: step(i, c, True), carry)
            carry = lax.fori_loop(diagonal, end, lambda i, c: step(i, c, bool(documents)), carry)
            a_KQ, *sums, slot = carry
            sums = ops.multiply(
                sums,
                gradient_products(block_of(slot), a_KQ, 0),
                lambda read: tuple(read(i, 0) for i in range(len(sums))),
            )
            plgpu.barrier_arrive(memory["free"].at[slot])

            plgpu.commit_smem()  # every warp is done with the keys
            results = [
                own[name] if name in own else memory[f"d_{name}"].at[warpgroup]
                for name in gradient.outputs
            ]
            for result, total in zip(results, sums, strict=True):
                result[...] = (total * scale if gradient.of_scores else total).astype(jnp.bfloat16)
            plgpu.commit_smem()
            for result, out in zip(results, outputs, strict=True):
                plgpu.copy_smem_to_gmem(result, out.at[batch, rows, head])
            return slot

        own_tile(documents, one_tile)
        plgpu.wait_smem_to_gmem(0)

    # The rope key's gradient is of every head: as wide as the rope query.
    likes = [q_rope if name == "k_rope" else arrays[name] for name in gradient.outputs]
    out_types = tuple(jax.ShapeDtypeStruct(like.shape, jnp.bfloat16) for like in likes)
    return common.launch(
        gradient.name, move, compute, scratch, operands, out_types, order.count, interpret
    )

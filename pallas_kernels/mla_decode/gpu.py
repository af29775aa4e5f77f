"""Hopper kernel: 64 queries (heads, and new tokens) of a row against a part of its tokens.

The first warpgroup computes the scores of a block of tokens and the first half of the output's 512
columns, the second the other half, of weights that it gets by shared memory. So the tensor cores
have the second's products to do while the first turns scores into weights. A block of latents is
read once, as keys and as values. Parts of a row are put together by their log-sum-exp, in order, so
results do not differ between runs.

Letters: `__init__.py`; M queries of a row, T N of them in whole tiles of 64; Q and K queries and
tokens of a tile; X parts of a row.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import common
from pallas_kernels.mla_attention.common import LOG2E, MASKED, ROWS, operand

WIDTHS = (512, 64)  # latent, rope: what the shared memory is laid out for
KEYS = 64  # tokens of a block
HALF = WIDTHS[0] // 2  # columns of the output that a warpgroup has


@dataclass(frozen=True)
class Config:
    parts: int | None = None  # of a row; None: by the number of programs
    stages: int = 2  # blocks of latents in flight


DEFAULT = Config()


def refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, interpret: Any = None) -> None:
    """Raises NotImplementedError for operands that the kernel does not take."""
    if interpret is None and jax.__version_info__ < (0, 11):
        raise NotImplementedError("needs jax 0.11 or newer")
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        raise NotImplementedError("runs on compute capability 9.0 (Hopper) alone")
    arrays = (q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR)
    if any(x.dtype != jnp.bfloat16 for x in arrays):
        raise NotImplementedError("takes bfloat16 alone")
    widths = (q_latent_BTNL.shape[-1], q_rope_BTNR.shape[-1])
    if widths != WIDTHS:
        raise NotImplementedError(f"takes widths (latent, rope) {WIDTHS}, not {widths}")
    page_tokens = latent_YZSL.shape[2]
    if page_tokens % 8 or (KEYS % page_tokens and page_tokens % KEYS):
        raise NotImplementedError(f"takes pages of 8, 16, 32 or n x 64 tokens, not {page_tokens}")


def num_parts(num_rows: int, num_tiles: int, num_blocks: int) -> int:
    """Parts of a row: as many as all run at once, each with at least four blocks."""
    return max(1, min(common.SMS // (num_rows * num_tiles), num_blocks // 4))


def mla_decode_hopper(
    q_latent_BTNL: jax.Array,
    q_rope_BTNR: jax.Array,
    latent_YZSL: jax.Array,
    k_rope_YZSR: jax.Array,
    layer: jax.Array,
    pages_BZ: jax.Array,
    position_BT: jax.Array,
    scale: float,
    config: Config = DEFAULT,
    interpret: Any = None,
) -> jax.Array:
    """As `mla_decode_reference`; weights are rounded to bfloat16, and so are a row's parts.

    Raises:
      NotImplementedError: other operands, another GPU, or jax before 0.11.
    """
    refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, interpret)
    B, T, N, L = q_latent_BTNL.shape
    M = T * N
    missing = -M % ROWS

    def tiles(x_BTN, fill=0):
        flat = x_BTN.reshape(B, M, *x_BTN.shape[3:])
        pad = ((0, 0), (0, missing)) + ((0, 0),) * (flat.ndim - 2)
        return jnp.pad(flat, pad, constant_values=fill)

    # A query of padding sees the first token, so that all sums are positive.
    last_BM = tiles(jnp.broadcast_to(position_BT[..., None], (B, T, N)).astype(jnp.int32))
    num_blocks = pl.cdiv(pages_BZ.shape[1] * latent_YZSL.shape[2], KEYS)
    parts = config.parts or num_parts(B, (M + missing) // ROWS, num_blocks)
    o_BXML, lse_BXM = _parts(
        *(tiles(q_latent_BTNL), tiles(q_rope_BTNR), last_BM, latent_YZSL, k_rope_YZSR),
        *(jnp.reshape(layer, (1,)).astype(jnp.int32), pages_BZ.astype(jnp.int32)),
        *(parts, num_blocks, scale, config, interpret),
    )
    if parts == 1:
        o_BML = o_BXML[:, 0]
    else:
        share_BXM = jax.nn.softmax(lse_BXM, axis=1)
        o_BML = jnp.einsum("BXM,BXML->BML", share_BXM, o_BXML.astype(jnp.float32))
    return o_BML[:, :M].reshape(B, T, N, L).astype(q_latent_BTNL.dtype)


def _parts(
    q_latent, q_rope, last_BM, latent, k_rope, layer, pages, parts, num_blocks, scale, config,
    interpret,
):  # fmt: skip
    """Outputs [B, X, M, L] and log-sum-exps [B, X, M] of the parts of every row."""
    B, M, L = q_latent.shape
    R, page_tokens, stages = q_rope.shape[-1], latent.shape[2], config.stages
    tiles, blocks_of_part = M // ROWS, pl.cdiv(num_blocks, parts)
    copied = min(page_tokens, KEYS)  # tokens of a copy
    copies = KEYS // copied
    ops, to_log2, shape = common.Ops(interpret), scale * LOG2E, (ROWS, KEYS)
    # One more than the last block that a row's queries see.
    ends_B = last_BM.max(axis=1) // KEYS + 1
    last_BM = last_BM.astype(jnp.float32)  # exact up to 16 million tokens
    operands = (q_latent, q_rope, last_BM, latent, k_rope, layer, pages, ends_B)
    scratch = {
        "q_first": operand(ROWS, HALF),
        "q_second": operand(ROWS, HALF),
        "q_rope": operand(ROWS, R),
        "first": operand(stages, KEYS, HALF),
        "second": operand(stages, KEYS, HALF),
        "rope": operand(stages, KEYS, R),
        "weights": operand(ROWS, KEYS),
        "numbers": plgpu.SMEM((3, ROWS), jnp.float32),  # one array: each would fill a kilobyte
        "own_full": plgpu.Barrier(num_arrivals=4),
        "full": plgpu.Barrier(num_arrivals=3 * copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "weights_full": plgpu.Barrier(num_arrivals=1),
        "weights_free": plgpu.Barrier(num_arrivals=1),
    }

    def own_part(ends, body):
        """body(row, part, first query, first and last block)."""
        index = lax.axis_index("program")
        # Tiles of a part side by side: they share its latents in L2.
        rest, tile = common.divide(index, tiles)
        row, part = common.divide(rest, parts)
        first = part * blocks_of_part
        end = jnp.minimum(first + blocks_of_part, ends[row])
        return body(row, part, tile * ROWS, first, end)

    def move(inputs, memory):
        _, _, _, latent, k_rope, layer, pages, ends = inputs

        def one_part(row, part, query, first, end):
            @pl.loop(first, end)
            def _(block):
                done = block - first
                slot = lax.rem(done, jnp.int32(stages))
                full = memory["full"].at[slot]
                pl.when(done >= stages)(lambda: plgpu.barrier_wait(memory["free"].at[slot]))
                for copy in range(copies):
                    token = block * KEYS + copy * copied
                    page_of_row, offset = common.divide(token, page_tokens)
                    # The last block may reach over the table's end, where nothing is seen.
                    page_of_row = jnp.minimum(page_of_row, pages.shape[1] - 1)
                    here = (layer[0], pages[row, page_of_row], pl.ds(offset, copied))
                    there = (slot, pl.ds(copy * copied, copied)) if copies > 1 else (slot,)
                    for source, target in (
                        (latent.at[*here, pl.ds(0, HALF)], "first"),
                        (latent.at[*here, pl.ds(HALF, HALF)], "second"),
                        (k_rope.at[*here], "rope"),
                    ):
                        plgpu.copy_gmem_to_smem(source, memory[target].at[*there], full)

            common.wait_for_rest(memory["free"], jnp.maximum(end - first, 0), stages)

        own_part(ends, one_part)

    def compute(inputs, outputs, memory):
        q_latent, q_rope, last, _, _, _, _, ends = inputs
        o, lse = outputs
        is_first = lax.axis_index("wg") == 0
        full, free, weights_full, weights_free = (
            memory[name] for name in ("full", "free", "weights_full", "weights_free")
        )

        # Of what the second warpgroup has summed; the last token that a query sees; a result.
        factor, own_last, last_lse = (memory["numbers"].at[i] for i in range(3))

        def slot_of(done):
            return lax.rem(done, jnp.int32(stages))

        def scaled(o_QH, factor_Q):
            return o_QH * lax.broadcast_in_dim(factor_Q, o_QH.shape, [0])

        def add(o_QH, weights, values):
            return ops.multiply([o_QH], [(0, weights, values)], lambda read: read(0, 0))

        def scores_and_first_half(row, part, query, first, end):
            rows = pl.ds(query, ROWS)
            for source, target in (
                (q_latent.at[row, rows, pl.ds(0, HALF)], "q_first"),
                (q_latent.at[row, rows, pl.ds(HALF, HALF)], "q_second"),
                (q_rope.at[row, rows], "q_rope"),
            ):
                plgpu.copy_gmem_to_smem(source, memory[target], memory["own_full"])
            plgpu.copy_gmem_to_smem(last.at[row, rows], own_last, memory["own_full"])
            plgpu.barrier_wait(memory["own_full"])

            def step(block, carry):
                maximum_Q, sum_Q, o_QH = carry
                done = block - first
                slot = slot_of(done)
                plgpu.barrier_wait(full.at[slot])
                products = [
                    (0, memory["q_first"], common.transposed(memory["first"].at[slot])),
                    (0, memory["q_second"], common.transposed(memory["second"].at[slot])),
                    (0, memory["q_rope"], common.transposed(memory["rope"].at[slot])),
                ]
                s_QK = ops.multiply([shape], products, lambda read: read(0, 0))
                last_Q = ops.per_row(own_last[...]).astype(jnp.int32)
                column_QK = ops.index(shape, 1) + block * KEYS
                visible_QK = column_QK <= lax.broadcast_in_dim(last_Q, shape, [0])
                s_QK = jnp.where(visible_QK, s_QK, MASKED)
                new_Q = jnp.maximum(maximum_Q, s_QK.max(axis=1) * to_log2)
                p_QK = jnp.exp2(s_QK * to_log2 - lax.broadcast_in_dim(new_Q, shape, [0]))
                p_QK = jnp.where(visible_QK, p_QK, 0.0)
                factor_Q = jnp.exp2(maximum_Q - new_Q)
                sum_Q = sum_Q * factor_Q + p_QK.sum(axis=1)
                p_QK = lax.optimization_barrier(p_QK.astype(jnp.bfloat16))
                pl.when(done > 0)(lambda: plgpu.barrier_wait(weights_free))
                memory["weights"][...] = p_QK
                factor[...] = factor_Q
                plgpu.commit_smem()
                plgpu.barrier_arrive(weights_full)
                o_QH = add(scaled(o_QH, factor_Q), p_QK, memory["first"].at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return new_Q, sum_Q, o_QH

            start_Q = ops.per_row(jnp.full((ROWS,), MASKED, jnp.float32))
            none_Q = ops.per_row(jnp.zeros((ROWS,), jnp.float32))
            carry = (start_Q, none_Q, ops.zeros(ROWS, HALF))
            maximum_Q, sum_Q, o_QH = lax.fori_loop(first, end, step, carry)
            pl.when(end > first)(lambda: plgpu.barrier_wait(weights_free))
            # A part without a token that is seen has no weight in the row.
            sum_Q = jnp.maximum(sum_Q, 1e-30)
            factor[...] = 1 / sum_Q
            plgpu.commit_smem()
            plgpu.barrier_arrive(weights_full)
            memory["q_first"][...] = scaled(o_QH, 1 / sum_Q).astype(jnp.bfloat16)
            last_lse[...] = maximum_Q / LOG2E + jnp.log(sum_Q)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(memory["q_first"], o.at[row, part, rows, pl.ds(0, HALF)])
            plgpu.copy_smem_to_gmem(last_lse, lse.at[row, part, rows])

        def second_half(row, part, query, first, end):
            def step(block, o_QH):
                slot = slot_of(block - first)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(weights_full)
                factor_Q = ops.per_row(factor[...])
                o_QH = add(scaled(o_QH, factor_Q), memory["weights"], memory["second"].at[slot])
                plgpu.commit_smem()  # every warp has read the factors
                plgpu.barrier_arrive(weights_free)
                plgpu.barrier_arrive(free.at[slot])
                return o_QH

            o_QH = lax.fori_loop(first, end, step, ops.zeros(ROWS, HALF))
            plgpu.barrier_wait(weights_full)
            o_QH = scaled(o_QH, ops.per_row(factor[...]))
            memory["q_second"][...] = o_QH.astype(jnp.bfloat16)
            plgpu.commit_smem()
            rows = pl.ds(query, ROWS)
            plgpu.copy_smem_to_gmem(memory["q_second"], o.at[row, part, rows, pl.ds(HALF, HALF)])

        pl.when(is_first)(lambda: own_part(ends, scores_and_first_half))
        pl.when(jnp.logical_not(is_first))(lambda: own_part(ends, second_half))
        plgpu.wait_smem_to_gmem(0)

    out_types = (
        jax.ShapeDtypeStruct((B, parts, M, L), jnp.bfloat16),
        jax.ShapeDtypeStruct((B, parts, M), jnp.float32),
    )
    programs = B * parts * tiles
    return common.launch(
        *("mla_decode", move, compute, scratch, operands, out_types, programs, interpret),
        reduction_scratch_bytes=1024,
    )

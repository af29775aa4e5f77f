"""Hopper kernel: 64 queries (heads, and new tokens) of a row against a part of its tokens.

The first warpgroup computes the scores of a block of tokens and the first half of the output's 512
columns, the second the other half, of weights that it gets by shared memory. So the tensor cores
have the second's products to do while the first turns scores into weights. A block of latents is
read once, as keys and as values. A third warpgroup brings the blocks (`latents.py`). Parts of a row
are put together by their log-sum-exp, in order, so results do not differ between runs.

Letters: `__init__.py`; M queries of a row, T N of them in whole tiles of 64; Q and K queries and
tokens of a tile; X parts of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mla_attention import common
from pallas_kernels.mla_attention.common import LOG2E, MASKED, ROWS
from pallas_kernels.mla_decode import latents

WIDTHS = (512, latents.ROPE)  # latent, rope: what the shared memory is laid out for
HALF = latents.HALF  # columns of the output that a warpgroup has


@dataclass(frozen=True)
class Config:
    parts: int | None = None  # of a row; None: by the number of programs
    keys: int = 64  # tokens of a block: 32 or 64
    stages: int = 2  # blocks in shared memory, as bfloat16
    code_stages: int | None = None  # blocks of codes there; None: the cache has no codes

    @property
    def rope_stages(self) -> int:
        """Of rope keys, which stay from the arrival of a block to its last product."""
        return self.stages + (self.code_stages or 0)


DEFAULT = Config()
DEFAULT_CODES = Config(keys=32, code_stages=2)


def refuse(
    q_latent_BTNL,
    q_rope_BTNR,
    latent_YZSL,
    k_rope_YZSR,
    has_scales: bool = False,
    interpret: Any = None,
) -> None:
    """Raises NotImplementedError for operands (or their shapes) that the kernel does not take."""
    if interpret is None and jax.__version_info__ < (0, 11):
        raise NotImplementedError("needs jax 0.11 or newer")
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        raise NotImplementedError("runs on compute capability 9.0 (Hopper) alone")
    if any(x.dtype != jnp.bfloat16 for x in (q_latent_BTNL, q_rope_BTNR, k_rope_YZSR)):
        raise NotImplementedError("takes queries and rope keys in bfloat16 alone")
    if latent_YZSL.dtype != (jnp.float8_e4m3fn if has_scales else jnp.bfloat16):
        raise NotImplementedError("takes latents in bfloat16, or in E4M3 with scales")
    widths = (q_latent_BTNL.shape[-1], q_rope_BTNR.shape[-1])
    if widths != WIDTHS:
        raise NotImplementedError(f"takes widths (latent, rope) {WIDTHS}, not {widths}")
    page_tokens = latent_YZSL.shape[2]
    if page_tokens % 64 and page_tokens not in ((32,) if has_scales else (8, 16, 32)):
        sizes = "32" if has_scales else "8, 16, 32"
        raise NotImplementedError(f"takes pages of {sizes} or n x 64 tokens, not {page_tokens}")


def num_parts(num_rows: int, num_tiles: int, num_blocks: int) -> int:
    """Parts of a row: as many as all run at once, each with at least four blocks of 64 tokens."""
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
    latent_scale_YZCS: jax.Array | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """As `mla_decode_reference`; weights are rounded to bfloat16, and so are a row's parts.

    Raises:
      NotImplementedError: other operands, another GPU, or jax before 0.11.
    """
    has_scales = latent_scale_YZCS is not None
    refuse(q_latent_BTNL, q_rope_BTNR, latent_YZSL, k_rope_YZSR, has_scales, interpret)
    config = config or (DEFAULT_CODES if has_scales else DEFAULT)
    B, T, N, L = q_latent_BTNL.shape
    M = T * N
    missing = -M % ROWS

    def tiles(x_BTN, fill=0):
        flat = x_BTN.reshape(B, M, *x_BTN.shape[3:])
        pad = ((0, 0), (0, missing)) + ((0, 0),) * (flat.ndim - 2)
        return jnp.pad(flat, pad, constant_values=fill)

    # A query of padding sees the first token, so that all sums are positive.
    last_BM = tiles(jnp.broadcast_to(position_BT[..., None], (B, T, N)).astype(jnp.int32))
    num_tokens = pages_BZ.shape[1] * latent_YZSL.shape[2]
    parts = config.parts or num_parts(B, (M + missing) // ROWS, pl.cdiv(num_tokens, 64))
    pages = latents.Pages(
        *(latent_YZSL, k_rope_YZSR, latent_scale_YZCS),
        *(jnp.reshape(layer, (1,)).astype(jnp.int32), pages_BZ.astype(jnp.int32)),
        position_BT.max(axis=1).astype(jnp.int32) + 1,
    )
    queries = (tiles(q_latent_BTNL), tiles(q_rope_BTNR), last_BM)
    config = replace(config, parts=parts)
    o_BXML, lse_BXM = _parts(*queries, pages, num_tokens, scale, config, interpret)
    if parts == 1:
        o_BML = o_BXML[:, 0]
    else:
        share_BXM = jax.nn.softmax(lse_BXM, axis=1)
        o_BML = jnp.einsum("BXM,BXML->BML", share_BXM, o_BXML.astype(jnp.float32))
    return o_BML[:, :M].reshape(B, T, N, L).astype(q_latent_BTNL.dtype)


def _parts(q_latent, q_rope, last_BM, pages, num_tokens, scale, config, interpret):
    """Outputs [B, X, M, L] and log-sum-exps [B, X, M] of the parts of every row."""
    B, M, L = q_latent.shape
    R, keys, stages, parts = q_rope.shape[-1], config.keys, config.stages, config.parts
    tiles, blocks_of_part = M // ROWS, pl.cdiv(pl.cdiv(num_tokens, keys), parts)
    ops, to_log2, shape = common.Ops(interpret), scale * LOG2E, (ROWS, keys)
    last_BM = last_BM.astype(jnp.float32)  # exact up to 16 million tokens
    operands = (q_latent, q_rope, last_BM, *jax.tree.leaves(pages))
    pages_of = jax.tree.structure(pages).unflatten
    loader = latents.loader(pages, config, ops)
    # Products add up whole lines of their operands: no longer than a block is.
    layout = (plgpu.TilingTransform((8, keys)), plgpu.SwizzleTransform(2 * keys))

    def operand(*shape):
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=layout)

    scratch = loader.scratch | {
        "q_first": operand(ROWS, HALF),
        "q_second": operand(ROWS, HALF),
        "q_rope": operand(ROWS, R),
        # The second half of the columns of a block below its first.
        "latent": operand(stages, 2 * keys, HALF),
        "rope": operand(config.rope_stages, keys, R),
        "weights": operand(*shape),
        "numbers": plgpu.SMEM((3, ROWS), jnp.float32),  # one array: each would fill a kilobyte
        "own_full": plgpu.Barrier(num_arrivals=4),
        "full": plgpu.Barrier(num_arrivals=loader.arrivals, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "weights_full": plgpu.Barrier(num_arrivals=1),
        "weights_free": plgpu.Barrier(num_arrivals=1),
    }

    def own_part(length_B, body):
        """body(row, part, first query, first block and end, tokens of the row)."""
        index = lax.axis_index("program")
        # Tiles of a part side by side: they share its latents in L2.
        rest, tile = common.divide(index, tiles)
        row, part = common.divide(rest, parts)
        first, length = part * blocks_of_part, length_B[row]
        end = jnp.minimum(first + blocks_of_part, lax.div(length + (keys - 1), keys))
        return body(row, part, tile * ROWS, first, end, length)

    def move(inputs, memory):
        pages = pages_of(inputs[3:])

        def one_part(row, part, query, first, end, length):
            loader.move(pages, memory, row, first, end)
            common.wait_for_rest(memory["free"], jnp.maximum(end - first, 0), stages)

        own_part(pages.length_B, one_part)

    def compute(inputs, outputs, memory, warpgroup):
        q_latent, q_rope, last, *rest = inputs
        length_B = pages_of(rest).length_B
        o, lse = outputs
        full, free, weights_full, weights_free = (
            memory[name] for name in ("full", "free", "weights_full", "weights_free")
        )

        # Of what the second warpgroup has summed; the last token that a query sees; a result.
        factor, own_last, last_lse = (memory["numbers"].at[i] for i in range(3))

        def block_of(done):
            """Slot, two halves and rope keys of a block."""
            slot = lax.rem(done, jnp.int32(stages))
            halves = [memory["latent"].at[slot, pl.ds(i * keys, keys)] for i in range(2)]
            return slot, *halves, memory["rope"].at[lax.rem(done, jnp.int32(config.rope_stages))]

        def clear_rest(slot, num_tokens):
            """Zeros after a row's tokens: a weight of zero does not silence a NaN there."""
            lines = 64  # of pieces, which must fit in registers beside a block's output
            for line in range(0, 2 * keys, lines):
                token = (ops.index((lines, keys), 0) + line) & (keys - 1)
                for column in range(0, HALF, keys):
                    piece = memory["latent"].at[slot, pl.ds(line, lines), pl.ds(column, keys)]
                    piece[...] = jnp.where(token < num_tokens, piece[...], 0.0)
            plgpu.commit_smem()

        def scaled(o_QH, factor_Q):
            return o_QH * lax.broadcast_in_dim(factor_Q, o_QH.shape, [0])

        def add(o_QH, weights, values):
            return ops.multiply([o_QH], [(0, weights, values)], lambda read: read(0, 0))

        def scores_and_first_half(row, part, query, first, end, length):
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
                slot, first_half, second_half, rope = block_of(done)
                plgpu.barrier_wait(full.at[slot])
                tokens_left = length - block * keys
                pl.when(tokens_left < keys)(lambda: clear_rest(slot, tokens_left))
                products = [
                    (0, memory["q_first"], common.transposed(first_half)),
                    (0, memory["q_second"], common.transposed(second_half)),
                    (0, memory["q_rope"], common.transposed(rope)),
                ]
                s_QK = ops.multiply([shape], products, lambda read: read(0, 0))
                last_Q = ops.per_row(own_last[...]).astype(jnp.int32) - block * keys
                visible_QK = ops.index(shape, 1) <= lax.broadcast_in_dim(last_Q, shape, [0])
                s_QK = jnp.where(visible_QK, s_QK, -jnp.inf)  # no maximum: that starts finite
                new_Q = jnp.maximum(maximum_Q, s_QK.max(axis=1) * to_log2)
                p_QK = jnp.exp2(s_QK * to_log2 - lax.broadcast_in_dim(new_Q, shape, [0]))
                factor_Q = jnp.exp2(maximum_Q - new_Q)
                sum_Q = sum_Q * factor_Q + p_QK.sum(axis=1)
                p_QK = lax.optimization_barrier(p_QK.astype(jnp.bfloat16))
                pl.when(done > 0)(lambda: plgpu.barrier_wait(weights_free))
                memory["weights"][...] = p_QK
                factor[...] = factor_Q
                plgpu.commit_smem()
                plgpu.barrier_arrive(weights_full)
                o_QH = add(scaled(o_QH, factor_Q), p_QK, first_half)
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

        def output_of_second_half(row, part, query, first, end, length):
            def step(block, o_QH):
                slot, _, second_half, _ = block_of(block - first)
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_wait(weights_full)
                factor_Q = ops.per_row(factor[...])
                o_QH = add(scaled(o_QH, factor_Q), memory["weights"], second_half)
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

        own_part(length_B, (scores_and_first_half, output_of_second_half)[warpgroup])
        plgpu.wait_smem_to_gmem(0)

    out_types = (
        jax.ShapeDtypeStruct((B, parts, M, L), jnp.bfloat16),
        jax.ShapeDtypeStruct((B, parts, M), jnp.float32),
    )
    programs = B * parts * tiles
    return common.launch(
        *("mla_decode", move, compute, scratch, operands, out_types, programs, interpret),
        reduction_scratch_bytes=1024,
        registers=loader.registers,
        moves_together=config.code_stages is not None,
    )

"""TPU kernels of the backward pass: one for the gradients of queries, one for those of keys and
values.

Both compute the scores again, so every sum is of one program, in an order that is always the same.
That of keys and values has scores with keys along the sublanes: its products then take weights as
they lie, and what belongs to a query is a row. `delta` is the sum over a row of do * o.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import tpu_blocks as blocks
from pallas_kernels.mla_attention.tpu_blocks import joined
from pallas_kernels.mla_attention.tpu_common import LOG2E, MASKED, column, multiply, wide
from pallas_kernels.tpu_gemm import LANES


def query_gradients(
    q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH, starts_BT, scale,
    do_BNTH, lse_BNT, delta_BNT, config: blocks.Config, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    """dq_nope_BNTP and dq_rope_BNTR."""
    B, N, T, P = q_nope_BNTP.shape
    R = q_rope_BNTR.shape[-1]
    grid = blocks.Blocks(blocks.keys_of_queries, (B, N, T), config)
    tokens, heads = grid.tokens, grid.heads
    inputs = (q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH)
    operands = _operands(inputs, starts_BT, do_BNTH, lse_BNT, delta_BNT)
    outputs = {
        "dq_nope": (jax.ShapeDtypeStruct(q_nope_BNTP.shape, q_nope_BNTP.dtype), "query"),
        "dq_rope": (jax.ShapeDtypeStruct(q_rope_BNTR.shape, q_rope_BNTR.dtype), "query"),
    }
    scratch = {
        "dq": pltpu.VMEM((heads, tokens, P + R), jnp.float32),
        "lse_column": pltpu.VMEM((heads, tokens, LANES), jnp.float32),
        "delta_column": pltpu.VMEM((heads, tokens, LANES), jnp.float32),
    }
    if starts_BT is not None:
        scratch["starts_column"] = pltpu.VMEM((tokens, LANES), jnp.int32)

    def body(step, limits, refs):
        @pl.when(step.is_first)
        def _():
            refs.dq[...] = jnp.zeros(refs.dq.shape, jnp.float32)
            for head in range(heads):
                refs.lse_column[head] = column(refs.lse[head])
                refs.delta_column[head] = column(refs.delta[head])
            if starts_BT is not None:
                refs.starts_column[...] = column(refs.starts[...])

        def starts():
            return None if starts_BT is None else wide(refs.starts_column[...], tokens)

        def take(masked):
            visible_QK = blocks.visible(step, starts(), tokens, query_dim=0) if masked else None
            for head in range(heads):
                q_QC = joined(refs.q_nope[head], refs.q_rope[head])
                k_KC = joined(refs.k_nope[head], refs.k_rope[...])
                lse_QK, delta_QK = (
                    wide(x[head], tokens) for x in (refs.lse_column, refs.delta_column)
                )
                p_QK = _weights(multiply(q_QC, k_KC, (1, 1)), visible_QK, lse_QK, scale)
                dp_QK = multiply(refs.do[head], refs.v[head], (1, 1))
                ds_QK = (p_QK * (dp_QK - delta_QK)).astype(k_KC.dtype)
                refs.dq[head] += multiply(ds_QK, k_KC, (1, 0))

        blocks.visit(step, limits, take)

        @pl.when(step.is_last)
        def _():
            dq = refs.dq[...] * scale
            refs.dq_nope[...] = dq[..., :P].astype(q_nope_BNTP.dtype)
            refs.dq_rope[...] = dq[..., P:].astype(q_rope_BNTR.dtype)

    limits = blocks.bounds(starts_BT, (B, T), tokens)
    return grid.launch("mla_dq", body, limits, operands, outputs, scratch, interpret)


def key_value_gradients(
    q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH, starts_BT, scale,
    do_BNTH, lse_BNT, delta_BNT, config: blocks.Config, interpret: Any,
) -> list[jax.Array]:  # fmt: skip
    """dk_nope_BNTP, dk_rope_BTR (summed over the heads in float32) and dv_BNTH."""
    B, N, T, P = k_nope_BNTP.shape
    R, H = k_rope_BTR.shape[-1], v_BNTH.shape[-1]
    grid = blocks.Blocks(blocks.queries_of_keys, (B, N, T), config)
    tokens, heads = grid.tokens, grid.heads
    inputs = (q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH)
    operands = _operands(inputs, starts_BT, do_BNTH, lse_BNT, delta_BNT)
    outputs = {
        f"d{name}": (jax.ShapeDtypeStruct(like.shape, like.dtype), "key")
        for name, like in (("k_nope", k_nope_BNTP), ("k_rope", k_rope_BTR), ("v", v_BNTH))
    }
    scratch = {
        "dk_nope_sum": pltpu.VMEM((heads, tokens, P), jnp.float32),
        "dk_rope_sum": pltpu.VMEM((tokens, R), jnp.float32),
        "dv_sum": pltpu.VMEM((heads, tokens, H), jnp.float32),
    }

    def body(step, limits, refs):
        @pl.when(step.is_first)
        def _():
            refs.dk_nope_sum[...] = jnp.zeros(refs.dk_nope_sum.shape, jnp.float32)
            refs.dv_sum[...] = jnp.zeros(refs.dv_sum.shape, jnp.float32)

        @pl.when(step.is_first & (step.heads == 0))
        def _():
            refs.dk_rope_sum[...] = jnp.zeros(refs.dk_rope_sum.shape, jnp.float32)

        def take(masked):
            visible_KQ = None
            if masked:
                starts = None if starts_BT is None else refs.starts[...]
                visible_KQ = blocks.visible(step, starts, tokens, query_dim=1)
            for head in range(heads):
                q_QC = joined(refs.q_nope[head], refs.q_rope[head])
                k_KC = joined(refs.k_nope[head], refs.k_rope[...])
                p_KQ = _weights(multiply(k_KC, q_QC, (1, 1)), visible_KQ, refs.lse[head], scale)
                refs.dv_sum[head] += multiply(p_KQ.astype(v_BNTH.dtype), refs.do[head], (1, 0))
                dp_KQ = multiply(refs.v[head], refs.do[head], (1, 1))
                ds_KQ = (p_KQ * (dp_KQ - refs.delta[head])).astype(q_QC.dtype)
                dk_KC = multiply(ds_KQ, q_QC, (1, 0))
                refs.dk_nope_sum[head] += dk_KC[:, :P]
                refs.dk_rope_sum[...] += dk_KC[:, P:]

        blocks.visit(step, limits, take)

        @pl.when(step.is_last)
        def _():
            refs.dk_nope[...] = (refs.dk_nope_sum[...] * scale).astype(k_nope_BNTP.dtype)
            refs.dv[...] = refs.dv_sum[...].astype(v_BNTH.dtype)

        @pl.when(step.is_last & (step.heads == N // heads - 1))
        def _():
            refs.dk_rope[...] = (refs.dk_rope_sum[...] * scale).astype(k_rope_BTR.dtype)

    limits = blocks.bounds(starts_BT, (B, T), tokens)
    return grid.launch("mla_dkv", body, limits, operands, outputs, scratch, interpret)


def _operands(inputs, starts_BT, do_BNTH, lse_BNT, delta_BNT) -> dict:
    """With the log-sum-exp as a power of two."""
    return blocks.operands(inputs, starts_BT) | {
        "do": (do_BNTH, "query"),
        "lse": (lse_BNT[:, :, None] * LOG2E, "query"),
        "delta": (delta_BNT[:, :, None], "query"),
    }


def _weights(s: jax.Array, visible: jax.Array | None, lse: jax.Array, scale: float) -> jax.Array:
    """Softmax's weights from products and the log-sum-exp as a power of two."""
    s = s * (scale * LOG2E)
    return jnp.exp2((s if visible is None else jnp.where(visible, s, MASKED)) - lse)

"""TPU kernel of the forward pass: online softmax over the keys that a block of queries sees."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import tpu_blocks as blocks
from pallas_kernels.mla_attention.tpu_blocks import joined
from pallas_kernels.mla_attention.tpu_common import (
    LOG2E,
    MASKED,
    Softmax,
    column,
    multiply,
    row,
    wide,
)
from pallas_kernels.tpu_gemm import LANES


def forward(
    q_nope_BNTP: jax.Array,
    q_rope_BNTR: jax.Array,
    k_nope_BNTP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BNTH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    config: blocks.Config,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """o_BNTH and lse_BNT, for bfloat16, whole blocks of tokens and starts that ascend."""
    B, N, T, H = v_BNTH.shape
    grid = blocks.Blocks(blocks.keys_of_queries, (B, N, T), config)
    tokens, heads = grid.tokens, grid.heads
    inputs = (q_nope_BNTP, q_rope_BNTR, k_nope_BNTP, k_rope_BTR, v_BNTH)
    operands = blocks.operands(inputs, starts_BT)
    outputs = {
        "o": (jax.ShapeDtypeStruct(v_BNTH.shape, v_BNTH.dtype), "query"),
        "lse": (jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32), "query"),
    }
    scratch = {
        "maximum": pltpu.VMEM((heads, tokens, LANES), jnp.float32),
        "total": pltpu.VMEM((heads, tokens, LANES), jnp.float32),
        "o_sum": pltpu.VMEM((heads, tokens, H), jnp.float32),
    }
    if starts_BT is not None:
        scratch["starts_column"] = pltpu.VMEM((tokens, LANES), jnp.int32)

    def body(step, limits, refs):
        softmaxes = [
            Softmax(refs.maximum.at[head], refs.total.at[head], refs.o_sum.at[head])
            for head in range(heads)
        ]

        @pl.when(step.is_first)
        def _():
            for softmax in softmaxes:
                softmax.start()
            if starts_BT is not None:
                refs.starts_column[...] = column(refs.starts[...])

        def take(masked):
            if masked:
                starts = None
                if starts_BT is not None:
                    starts = wide(refs.starts_column[...], tokens)
                visible_QK = blocks.visible(step, starts, tokens, query_dim=0)
            for head, softmax in enumerate(softmaxes):
                q_QC = joined(refs.q_nope[head], refs.q_rope[head])
                k_KC = joined(refs.k_nope[head], refs.k_rope[...])
                s_QK = multiply(q_QC, k_KC, (1, 1)) * (scale * LOG2E)
                softmax.add(jnp.where(visible_QK, s_QK, MASKED) if masked else s_QK, refs.v[head])

        blocks.visit(step, limits, take)

        @pl.when(step.is_last)
        def _():
            for head, softmax in enumerate(softmaxes):
                o_QH, lse_QL = softmax.output()
                refs.o[head] = o_QH.astype(v_BNTH.dtype)
                refs.lse[head] = row(lse_QL)

    limits = blocks.bounds(starts_BT, (B, T), tokens)
    o_BNTH, lse_BN1T = grid.launch(
        "mla_forward", body, limits, operands, outputs, scratch, interpret
    )
    return o_BNTH, lse_BN1T[:, :, 0]

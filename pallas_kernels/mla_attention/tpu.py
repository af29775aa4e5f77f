"""Both passes on TPU: arrays in heads and whole blocks for the kernels, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.mla_attention import tpu_backward, tpu_forward
from pallas_kernels.mla_attention.operands import output_products, refuse_operands, whole_tiles
from pallas_kernels.mla_attention.tpu_blocks import Config

DEFAULT = Config()


def forward_tpu(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    config: Config = DEFAULT,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """As `mla_attention_reference`, for bfloat16 and DeepSeek's widths.

    Raises:
      NotImplementedError: other operands.
    """
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    refuse_operands(inputs)
    num_tokens = q_nope_BTNP.shape[1]
    inputs_starts = _for_kernels(config, inputs, starts_BT)
    o_BNTH, lse_BNT = tpu_forward.forward(*inputs_starts, scale, config, interpret)
    return _heads_last(o_BNTH)[:, :num_tokens], lse_BNT[..., :num_tokens]


def backward_tpu(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    o_BTNH: jax.Array,
    lse_BNT: jax.Array,
    do_BTNH: jax.Array,
    config: Config = DEFAULT,
    interpret: Any = False,
) -> tuple[jax.Array, ...]:
    """The gradients of the five inputs; raises as `forward_tpu`."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    refuse_operands(inputs)
    num_tokens = q_nope_BTNP.shape[1]
    delta_BNT = output_products(o_BTNH, do_BTNH)
    rest = -num_tokens % config.block(num_tokens)
    # A padded query's gradient is zero whatever its weights are, as long as they are finite.
    lse_BNT, delta_BNT = (jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (lse_BNT, delta_BNT))
    *inputs, do_BNTH, starts_BT = _for_kernels(
        config, (*inputs, do_BTNH.astype(v_BTNH.dtype)), starts_BT
    )
    operands = (*inputs, starts_BT, scale, do_BNTH, lse_BNT, delta_BNT, config, interpret)
    gradients = (
        *tpu_backward.query_gradients(*operands),
        *tpu_backward.key_value_gradients(*operands),
    )
    return tuple(_heads_last(x)[:, :num_tokens] for x in gradients)


def _for_kernels(config: Config, arrays, starts_BT):
    """[B, N, T, ...] in whole blocks, and the starts."""
    block = config.block(arrays[0].shape[1])
    *arrays, starts_BT = whole_tiles(block, *arrays, starts_BT)
    if starts_BT is not None:  # padding is of the last document, so that starts ascend
        starts_BT = lax.cummax(starts_BT, axis=1)
    # A memory layout to XLA, which it can have the products before write.
    return *(x.swapaxes(1, 2) if x.ndim == 4 else x for x in arrays), starts_BT


def _heads_last(x):
    return x.swapaxes(1, 2) if x.ndim == 4 else x

"""Both passes on Hopper: whole tiles of tokens for the kernels, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention import gpu_backward, gpu_backward_keys, gpu_forward
from pallas_kernels.mla_attention.common import TILE
from pallas_kernels.mla_attention.operands import output_products, refuse_operands, whole_tiles


def forward_hopper(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """As `mla_attention_reference`, for bfloat16 and DeepSeek's widths.

    Raises:
      NotImplementedError: other operands, another GPU, or jax before 0.11.
    """
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    refuse(inputs, interpret)
    num_tokens = q_nope_BTNP.shape[1]
    *inputs, starts_BT = whole_tiles(TILE, *inputs, starts_BT)
    o_BTNH, lse_BNT = gpu_forward.forward(*inputs, starts_BT, scale, interpret=interpret)
    return o_BTNH[:, :num_tokens], lse_BNT[..., :num_tokens]


def backward_hopper(
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
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """The gradients of the five inputs; raises as `forward_hopper`."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    refuse(inputs, interpret)
    num_tokens = q_nope_BTNP.shape[1]
    delta_BNT = output_products(o_BTNH, do_BTNH)
    *inputs, do_BTNH, starts_BT = whole_tiles(
        TILE, *inputs, do_BTNH.astype(v_BTNH.dtype), starts_BT
    )
    rest = -num_tokens % TILE
    # A padded query's gradient is zero whatever its weights are, as long as they are finite.
    lse_BNT, delta_BNT = (jnp.pad(x, ((0, 0), (0, 0), (0, rest))) for x in (lse_BNT, delta_BNT))
    operands = (*inputs, starts_BT, scale, do_BTNH, lse_BNT, delta_BNT)
    dq_nope_BTNP, dq_rope_BTNR = gpu_backward.query_gradients(*operands, interpret=interpret)
    dk_nope_BTNP, dk_rope_BTNR = gpu_backward_keys.key_gradients(*operands, interpret=interpret)
    dv_BTNH = gpu_backward_keys.value_gradients(*operands, interpret=interpret)
    dk_rope_BTR = dk_rope_BTNR.astype(jnp.float32).sum(2).astype(k_rope_BTR.dtype)
    gradients = (dq_nope_BTNP, dq_rope_BTNR, dk_nope_BTNP, dk_rope_BTR, dv_BTNH)
    return tuple(x[:, :num_tokens] for x in gradients)


def refuse(inputs: tuple[jax.Array, ...], interpret: Any = None) -> None:
    """Raises NotImplementedError for inputs that the kernels do not take."""
    if interpret is None and jax.__version_info__ < (0, 11):
        raise NotImplementedError("needs jax 0.11 or newer")
    if jax.default_backend() == "gpu" and jax.devices()[0].compute_capability != "9.0":
        raise NotImplementedError("runs on compute capability 9.0 (Hopper) alone")
    refuse_operands(inputs)

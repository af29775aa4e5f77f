"""Causal attention of MLA: queries and keys of 128 + 64, values of 128, one rope key for all heads.

`mla_attention` is differentiable; `forward` and `backward` are its two halves, for a caller that
keeps the output in another format or runs them apart.
"""

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import dispatch
from pallas_kernels.mla_attention import gpu, tpu
from pallas_kernels.mla_attention.operands import refuse_operands
from pallas_kernels.mla_attention.reference import (
    document_starts,
    mla_attention_reference,
    mla_gradients_reference,
)

__all__ = ["backward", "document_starts", "forward", "mla_attention", "refuse"]

_FORWARD = {
    "hopper": gpu.forward_hopper,
    "tpu": tpu.forward_tpu,
    "reference": mla_attention_reference,
}
_BACKWARD = {
    "hopper": gpu.backward_hopper,
    "tpu": tpu.backward_tpu,
    "reference": mla_gradients_reference,
}
_REFUSE = {"hopper": gpu.refuse, "tpu": refuse_operands}


def mla_attention(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """o_BTNH: softmax over j <= t of scale * (q_nope.k_nope + q_rope.k_rope), times v (spec §2).

    What the derivative needs is named 'attention_out' and 'attention_lse' for recomputation
    policies.

    Args:
      segments_BT: int32 document numbers, a document's tokens side by side; a token attends to its
        own document only.
      implementation: 'reference', 'hopper' or 'tpu'; None: the best that accepts the operands.

    Raises:
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    starts_BT = None if segments_BT is None else document_starts(segments_BT)
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    return _attention(*inputs, starts_BT, scale, implementation)


def forward(*inputs_starts_scale, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """o_BTNH and lse_BNT: see `reference.mla_attention_reference`."""
    return dispatch.call("mla_attention", _FORWARD, implementation, *inputs_starts_scale)


def backward(*residuals_do, implementation: str | None = None) -> tuple[jax.Array, ...]:
    """The gradients of the five inputs: see `reference.mla_gradients_reference`."""
    return dispatch.call("mla_attention_gradients", _BACKWARD, implementation, *residuals_do)


def refuse(inputs: tuple[jax.Array, ...], implementation: str) -> None:
    """Raises NotImplementedError for the five inputs where 'hopper' or 'tpu' does not take them."""
    _REFUSE[implementation](inputs)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _attention(q_nope, q_rope, k_nope, k_rope, v, starts, scale, implementation):
    inputs = (q_nope, q_rope, k_nope, k_rope, v)
    return forward(*inputs, starts, scale, implementation=implementation)[0]


def _forward_rule(q_nope, q_rope, k_nope, k_rope, v, starts, scale, implementation):
    inputs = (q_nope, q_rope, k_nope, k_rope, v)
    o_BTNH, lse_BNT = forward(*inputs, starts, scale, implementation=implementation)
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    lse_BNT = checkpoint_name(lse_BNT, "attention_lse")
    return o_BTNH, (*inputs, starts, o_BTNH, lse_BNT)


def _backward_rule(scale, implementation, residuals, do_BTNH):
    *inputs, starts, o_BTNH, lse_BNT = residuals
    gradients = backward(
        *inputs, starts, scale, o_BTNH, lse_BNT, do_BTNH, implementation=implementation
    )
    return (*gradients, None)


_attention.defvjp(_forward_rule, _backward_rule)

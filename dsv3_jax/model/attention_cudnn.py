"""cuDNN's fused attention: one head dim for queries, keys and (zero-padded) values.

JAX's public function is differentiable but keeps its own output for the backward pass.
`forward` and `backward` are its two halves, for a caller that stores the output in another format
(spec §5.5). They use the private functions below the public one; without those, `has_passes` is
False.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp

try:
    from jax._src.cudnn import fused_attention_stablehlo as _cudnn
except ImportError:
    _cudnn = None

_BACKWARD_RULE = "_dot_product_attention_bwd_rule"
_BACKWARD_PARAMETERS = (
    *("scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout"),
    *("sliding_window_length", "is_training", "return_residual", "res", "grad_output"),
)


def has_passes() -> bool:
    """Whether this JAX has the private functions, and as we know them."""
    rule = getattr(_cudnn, _BACKWARD_RULE, None)
    public = getattr(_cudnn, "dot_product_attention", None)
    return (
        None not in (rule, public)
        and tuple(inspect.signature(rule).parameters) == _BACKWARD_PARAMETERS
        and "return_residual" in inspect.signature(public).parameters
    )


def refuse(inputs, segments_BT) -> None:
    """Raises NotImplementedError for inputs that it does not take."""
    q_nope_BTNP, q_rope_BTNR, _, _, v_BSNH = inputs
    if jax.default_backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    if segments_BT is not None:
        raise NotImplementedError("takes no separate documents")
    if v_BSNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 or float16, not {v_BSNH.dtype}")
    width, v_width = q_nope_BTNP.shape[-1] + q_rope_BTNR.shape[-1], v_BSNH.shape[-1]
    if width > 256 or width % 8 or v_width > width:
        raise NotImplementedError(f"takes no head widths {width} (q, k) and {v_width} (v)")
    jax.eval_shape(partial(attend, segments_BT=None, scale=1.0), *inputs)  # JAX refuses more


def attend(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale):
    """o_BTNH, differentiable."""
    o = jax.nn.dot_product_attention(
        *_one_width(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH),
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return o[..., : v_BSNH.shape[-1]]


def forward(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale):
    """o_BTNH and the float32 log-sum-exp, [B, N, T]."""
    o, lse_BNT = _cudnn.dot_product_attention(
        *_one_width(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH),
        scale=scale,
        mask_type=_cudnn.MaskType.CAUSAL,
        return_residual=True,
    )
    return o[..., : v_BSNH.shape[-1]], lse_BNT


def backward(inputs, segments_BT, scale, o_BTNH, lse_BNT, do_BTNH):
    """The gradients of the five inputs."""

    def padded(x):
        return _pad_last(x, inputs[0].shape[-1] + inputs[1].shape[-1])

    wide, of_inputs = jax.vjp(_one_width, *inputs)
    unused = jnp.zeros(0, o_BTNH.dtype)  # bias, lengths, offsets and page tables
    rule = getattr(_cudnn, _BACKWARD_RULE)
    d_wide = rule(
        scale,
        42,  # seed of a dropout that there is not
        0.0,
        (False, False),
        _cudnn.MaskType.CAUSAL,
        _cudnn.AttentionLayout.BTNH.value,
        None,
        True,
        False,
        (*wide, *[unused] * 7, lse_BNT, padded(o_BTNH)),
        padded(do_BTNH),
    )
    return of_inputs(tuple(d_wide[:3]))


def _one_width(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH):
    """Queries, keys and values of one head dim, the rope key broadcast to every head."""
    num_heads = k_nope_BSNP.shape[2]
    k_rope_BSNR = jnp.broadcast_to(
        k_rope_BSR[:, :, None], (*k_rope_BSR.shape[:2], num_heads, k_rope_BSR.shape[-1])
    )
    q = jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1)
    k = jnp.concatenate([k_nope_BSNP, k_rope_BSNR], axis=-1)
    return q, k, _pad_last(v_BSNH, q.shape[-1])


def _pad_last(x, width):
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])

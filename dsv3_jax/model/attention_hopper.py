"""Our Hopper kernels (pallas_kernels/mla_attention) as an attention of the model."""

import jax

from pallas_kernels import mla_attention as kernels


def refuse(inputs, segments_BT) -> None:
    """Raises NotImplementedError for inputs that they do not take."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    kernels.refuse(inputs)


def forward(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale):
    """o_BTNH and the float32 log-sum-exp, [B, N, T]."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH)
    return kernels.forward(*inputs, _starts(segments_BT), scale, implementation="hopper")


def backward(inputs, segments_BT, scale, o_BTNH, lse_BNT, do_BTNH):
    """The gradients of the five inputs."""
    residuals = (*inputs, _starts(segments_BT), scale, o_BTNH, lse_BNT)
    return kernels.backward(*residuals, do_BTNH, implementation="hopper")


def _starts(segments_BT):
    return None if segments_BT is None else kernels.document_starts(segments_BT)

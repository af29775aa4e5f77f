"""Our kernels (pallas_kernels/mla_attention) as attentions of the model."""

from collections.abc import Callable
from functools import partial

import jax

from pallas_kernels import mla_attention as kernels

PLATFORMS = {"hopper": ("gpu", "an NVIDIA GPU"), "tpu": ("tpu", "a TPU")}


def passes(implementation: str) -> tuple[Callable, Callable, Callable]:
    """`refuse`, `forward` and `backward` below, of 'hopper' or 'tpu'."""
    return tuple(partial(f, implementation=implementation) for f in (refuse, forward, backward))


def refuse(inputs, segments_BT, *, implementation) -> None:
    """Raises NotImplementedError for inputs that they do not take."""
    platform, device = PLATFORMS[implementation]
    if jax.default_backend() != platform:
        raise NotImplementedError(f"needs {device}")
    kernels.refuse(inputs, implementation)


def forward(
    q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale, *, implementation
):
    """o_BTNH and the float32 log-sum-exp, [B, N, T]."""
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH)
    return kernels.forward(*inputs, _starts(segments_BT), scale, implementation=implementation)


def backward(inputs, segments_BT, scale, o_BTNH, lse_BNT, do_BTNH, *, implementation):
    """The gradients of the five inputs."""
    residuals = (*inputs, _starts(segments_BT), scale, o_BTNH, lse_BNT)
    return kernels.backward(*residuals, do_BTNH, implementation=implementation)


def _starts(segments_BT):
    return None if segments_BT is None else kernels.document_starts(segments_BT)

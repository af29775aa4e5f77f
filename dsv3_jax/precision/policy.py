"""Which matmul runs in which format. The one place where a weight meets an activation.

Master weights are float32 and stay so: the cast happens here, and the weight gradient leaves the
matmul in float32 (spec §5.4), never rounded to the compute dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.precision.block_scaled import BlockScaled, refuse_gradient


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How FP8 products are made (spec §5). The defaults are the published recipe."""

    gradient_scales: str = "tiles"  # of activation gradients in Dgrad: 'tiles' or 'blocks'
    scales: str = "fine"  # 'tensor': one for all that a device has of an operand
    promotion: bool = True  # partial sums leave the tensor cores every 128 elements (spec §5.2)
    implementation: str | None = None  # of the kernels; None: the best that accepts the operands


PUBLISHED = Fp8Recipe()


def fp8_recipe(precision: PrecisionConfig) -> Fp8Recipe | None:
    """What a config asks for; None unless it computes in FP8."""
    if precision.compute != "fp8":
        return None
    return Fp8Recipe(
        gradient_scales=precision.gradient_scales,
        scales=precision.scales,
        promotion=precision.promotion,
    )


@dataclass(frozen=True, kw_only=True)
class Fp8Linear:
    """A Linear that runs in FP8, and which of its scales are powers of two (spec §5.3)."""

    power_of_two_input: bool = False
    power_of_two_gradient: bool = False  # of dY


# How every Linear runs in FP8 training, by role; None: in the compute dtype (spec §5.1, §5.4).
# Embedding, norms and attention core are no Linears and stay in the compute dtype too.
LINEARS: Mapping[str, Fp8Linear | None] = MappingProxyType(
    {
        "wq": Fp8Linear(),
        "wq_a": Fp8Linear(),
        "wq_b": Fp8Linear(),
        "wkv_a": Fp8Linear(),
        "wkv_b": Fp8Linear(),
        "wo": Fp8Linear(power_of_two_input=True),
        "w13": Fp8Linear(),  # dense blocks and the shared expert
        "w2": Fp8Linear(),
        "expert_w13": Fp8Linear(power_of_two_input=True),  # rows that were dispatched
        "expert_w2": Fp8Linear(power_of_two_gradient=True),  # backward of combine
        "router": None,
        "head": None,
        "mtp_proj": None,  # the release keeps eh_proj in BF16
    }
)


def is_fp8(path: tuple[str, ...]) -> bool:
    """Whether the weight at a path of the parameter tree multiplies in FP8, by its role.

    A Linear's path ends in its role and 'kernel', that of the routed experts in 'experts' and the
    name of the weight.
    """
    *_, module, name = ("", *path)
    return LINEARS.get(f"expert_{name}" if module == "experts" else module) is not None


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def dot(
    x: jax.Array,
    kernel_IO: jax.Array | BlockScaled,
    compute_dtype: jnp.dtype,
    output_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`x @ kernel` with operands in `compute_dtype` and float32 accumulation.

    Args:
      x: [..., I] activations.
      kernel_IO: [I, O] float32 master weight, or one kept in FP8.
      compute_dtype: format of both operands.
      output_dtype: format of the result; None: `compute_dtype`. The router asks for float32.

    Returns:
      [..., O] in `output_dtype`. Gradients: dx in x's dtype, d kernel in the kernel's dtype.
    """
    return _dot_forward(x, kernel_IO, compute_dtype, output_dtype)[0]


def _dot_forward(x, kernel_IO, compute_dtype, output_dtype):
    x_low = x.astype(compute_dtype)
    y = jnp.matmul(
        x_low,
        kernel_IO.astype(compute_dtype),
        preferred_element_type=output_dtype or compute_dtype,
    )
    # The zero-size array carries x's dtype to the backward pass.
    return y, (x_low, kernel_IO, jnp.zeros((0,), x.dtype))


def _dot_backward(compute_dtype, output_dtype, residuals, dy):
    del output_dtype
    x_low, kernel_IO, like_x = residuals
    refuse_gradient(kernel_IO)
    dy = dy.astype(compute_dtype)
    dx = jnp.matmul(dy, kernel_IO.astype(compute_dtype).T, preferred_element_type=compute_dtype)
    contracted = tuple(range(x_low.ndim - 1))
    d_kernel_IO = jax.lax.dot_general(
        x_low, dy, ((contracted, contracted), ((), ())), preferred_element_type=jnp.float32
    )
    return dx.astype(like_x.dtype), d_kernel_IO.astype(kernel_IO.dtype)


dot.defvjp(_dot_forward, _dot_backward)

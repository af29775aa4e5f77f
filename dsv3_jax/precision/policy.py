"""Which matmul runs in which format. The one place where a weight meets an activation.

Master weights are float32 and stay so: the cast happens here, and the weight gradient leaves the
matmul in float32 (spec §5.4), never rounded to the compute dtype.
"""

from functools import partial

import jax
import jax.numpy as jnp

from dsv3_jax.precision.block_scaled import BlockScaled, refuse_gradient


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

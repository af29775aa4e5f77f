"""FP8 product with a scale every 128 along the reduction: Fprop, Dgrad and Wgrad."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.fp8_matmul.reference import fp8_matmul_reference

__all__ = ["fp8_matmul"]

_IMPLEMENTATIONS = {"reference": fp8_matmul_reference}


def fp8_matmul(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
    add_MN: jax.Array | None = None,
) -> jax.Array:
    """y_MN in `out_dtype`: see `reference.fp8_matmul_reference`.

    Args:
      implementation: 'reference', 'hopper' or 'tpu'; None: the best that accepts the operands.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    return dispatch.call(
        "fp8_matmul", _IMPLEMENTATIONS, implementation, q_MK, s_MT, q_NK, s_BT, out_dtype, add_MN
    )

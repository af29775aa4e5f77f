"""FP8 products of rows sorted by group: experts' products, weight gradients, and decoding."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_fp8_matmul import reference, xla

__all__ = ["grouped_fp8_matmul", "grouped_fp8_weight_gradient", "masked_fp8_matmul"]

_PRODUCTS = {
    "xla": xla.grouped_fp8_matmul_xla,
    "reference": reference.grouped_fp8_matmul_reference,
}
_WEIGHT_GRADIENTS = {
    "xla": xla.grouped_fp8_weight_gradient_xla,
    "reference": reference.grouped_fp8_weight_gradient_reference,
}
_MASKED = {"reference": reference.masked_fp8_matmul_reference}


def grouped_fp8_matmul(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """y_MN in `out_dtype`: see `reference.grouped_fp8_matmul_reference`."""
    args = (q_MK, s_MT, q_GNK, s_GBT, group_sizes_G, out_dtype)
    return dispatch.call("grouped_fp8_matmul", _PRODUCTS, implementation, *args)


def grouped_fp8_weight_gradient(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """dw_GIO float32: see `reference.grouped_fp8_weight_gradient_reference`."""
    args = (q_IM, s_IR, q_OM, s_OR, group_sizes_G, add_GIO)
    return dispatch.call("grouped_fp8_weight_gradient", _WEIGHT_GRADIENTS, implementation, *args)


def masked_fp8_matmul(
    q_GMK: jax.Array,
    s_GMT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    num_rows_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """y_GMN in `out_dtype`: see `reference.masked_fp8_matmul_reference`."""
    args = (q_GMK, s_GMT, q_GNK, s_GBT, num_rows_G, out_dtype)
    return dispatch.call("masked_fp8_matmul", _MASKED, implementation, *args)

"""FP8 products of rows sorted by group: experts' products, weight gradients, and decoding."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.grouped_fp8_matmul import gpu, reference, tpu, xla
from pallas_kernels.operands import (
    BLOCKS,
    COLUMNS,
    TILES,
    block_scales,
    check_codes,
    check_float32,
    check_out_dtype,
    check_scales,
    checked_counts,
    tile_scales,
)
from pallas_kernels.quantize.reference import BLOCK

__all__ = ["grouped_fp8_matmul", "grouped_fp8_weight_gradient", "masked_fp8_matmul"]

_PRODUCTS = {
    "hopper": gpu.grouped_fp8_matmul_hopper,
    "tpu": tpu.grouped_fp8_matmul_tpu,
    "xla": xla.grouped_fp8_matmul_xla,
    "reference": reference.grouped_fp8_matmul_reference,
}
_WEIGHT_GRADIENTS = {
    "hopper": gpu.grouped_fp8_weight_gradient_hopper,
    "tpu": tpu.grouped_fp8_weight_gradient_tpu,
    "xla": xla.grouped_fp8_weight_gradient_xla,
    "reference": reference.grouped_fp8_weight_gradient_reference,
}
_MASKED = {
    "hopper": gpu.masked_fp8_matmul_hopper,
    "tpu": tpu.masked_fp8_matmul_tpu,
    "reference": reference.masked_fp8_matmul_reference,
}

_EACH = ", one matrix a group"


def grouped_fp8_matmul(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    group_sizes_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """y_MN in `out_dtype`: see `reference.grouped_fp8_matmul_reference`.

    Raises:
      ValueError: shapes, dtypes or sizes that do not belong together. Under `jit` sizes are not
        known: before an implementation sees them, what reaches past the M rows is cut off there.
    """
    operation = "grouped_fp8_matmul"
    check_codes(operation, "q_MK", q_MK, (-1, -1), TILES)
    check_scales(operation, "s_MT", s_MT, TILES, tile_scales(q_MK))
    check_codes(operation, "q_GNK", q_GNK, (-1, -1, q_MK.shape[1]), BLOCKS + _EACH)
    check_scales(operation, "s_GBT", s_GBT, BLOCKS + _EACH, block_scales(q_GNK))
    sizes_G = checked_counts(operation, "group_sizes_G", group_sizes_G, len(q_GNK), len(q_MK))
    check_out_dtype(operation, out_dtype)
    args = (q_MK, s_MT, q_GNK, s_GBT, sizes_G, out_dtype)
    return dispatch.call(operation, _PRODUCTS, implementation, *args)


def grouped_fp8_weight_gradient(
    q_IM: jax.Array,
    s_IR: jax.Array,
    q_OM: jax.Array,
    s_OR: jax.Array,
    group_sizes_G: jax.Array,
    add_GIO: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """dw_GIO float32: see `reference.grouped_fp8_weight_gradient_reference`.

    Raises:
      ValueError: as `grouped_fp8_matmul`; and sizes that are no multiples of 128, which under `jit`
        are rounded down to one.
    """
    operation = "grouped_fp8_weight_gradient"
    num_rows = q_IM.shape[-1]
    check_codes(operation, "q_IM", q_IM, (-1, -1), COLUMNS)
    check_scales(operation, "s_IR", s_IR, COLUMNS, tile_scales(q_IM))
    check_codes(operation, "q_OM", q_OM, (-1, num_rows), COLUMNS)
    check_scales(operation, "s_OR", s_OR, COLUMNS, tile_scales(q_OM))
    sizes_G = checked_counts(operation, "group_sizes_G", group_sizes_G, -1, num_rows, step=BLOCK)
    if add_GIO is not None:
        check_float32(operation, "add_GIO", add_GIO, (len(sizes_G), len(q_IM), len(q_OM)))
    args = (q_IM, s_IR, q_OM, s_OR, sizes_G, add_GIO)
    return dispatch.call(operation, _WEIGHT_GRADIENTS, implementation, *args)


def masked_fp8_matmul(
    q_GMK: jax.Array,
    s_GMT: jax.Array,
    q_GNK: jax.Array,
    s_GBT: jax.Array,
    num_rows_G: jax.Array,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """y_GMN in `out_dtype`: see `reference.masked_fp8_matmul_reference`.

    Raises:
      ValueError: as `grouped_fp8_matmul`.
    """
    operation = "masked_fp8_matmul"
    check_codes(operation, "q_GMK", q_GMK, (-1, -1, -1), TILES + _EACH)
    check_scales(operation, "s_GMT", s_GMT, TILES + _EACH, tile_scales(q_GMK))
    num_groups, num_rows, width = q_GMK.shape
    check_codes(operation, "q_GNK", q_GNK, (num_groups, -1, width), BLOCKS + _EACH)
    check_scales(operation, "s_GBT", s_GBT, BLOCKS + _EACH, block_scales(q_GNK))
    rows_G = checked_counts(operation, "num_rows_G", num_rows_G, num_groups, num_rows, each=True)
    check_out_dtype(operation, out_dtype)
    args = (q_GMK, s_GMT, q_GNK, s_GBT, rows_G, out_dtype)
    return dispatch.call(operation, _MASKED, implementation, *args)

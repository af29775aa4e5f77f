"""FP8 product with a scale every 128 along the reduction: Fprop, Dgrad and Wgrad."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.fp8_matmul.gpu import fp8_matmul_hopper
from pallas_kernels.fp8_matmul.reference import fp8_matmul_reference
from pallas_kernels.fp8_matmul.tpu import fp8_matmul_tpu
from pallas_kernels.operands import (
    BLOCKS,
    TILES,
    block_scales,
    check_codes,
    check_float32,
    check_out_dtype,
    check_scales,
    tile_scales,
)

__all__ = ["fp8_matmul"]

_IMPLEMENTATIONS = {
    "hopper": fp8_matmul_hopper,
    "tpu": fp8_matmul_tpu,
    "reference": fp8_matmul_reference,
}


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
      s_BT: with N rows it holds a scale a row, otherwise a scale a block of 128x128. For N = 1 the
        two have one shape, and one meaning.
      implementation: 'reference', 'hopper' or 'tpu'; None: the best that accepts the operands.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    _check(q_MK, s_MT, q_NK, s_BT, out_dtype, add_MN)
    return dispatch.call(
        "fp8_matmul", _IMPLEMENTATIONS, implementation, q_MK, s_MT, q_NK, s_BT, out_dtype, add_MN
    )


def _check(q_MK, s_MT, q_NK, s_BT, out_dtype, add_MN):
    operation = "fp8_matmul"
    check_codes(operation, "q_MK", q_MK, (-1, -1), TILES)
    check_scales(operation, "s_MT", s_MT, TILES, tile_scales(q_MK))
    check_codes(operation, "q_NK", q_NK, (-1, q_MK.shape[1]), BLOCKS)
    check_scales(operation, "s_BT", s_BT, BLOCKS, block_scales(q_NK), tile_scales(q_NK))
    check_out_dtype(operation, out_dtype)
    if add_MN is not None:
        check_float32(operation, "add_MN", add_MN, (len(q_MK), len(q_NK)))
        if out_dtype != jnp.float32:
            raise ValueError(
                f"{operation}: out_dtype is {jnp.dtype(out_dtype).name}; allowed with add_MN: "
                "float32, the format of gradients"
            )

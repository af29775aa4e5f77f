"""Quantisation to E4M3 with float32 scales: 1x128 and 128x1 tiles, 128x128 blocks.

Operands are checked here: each function raises a ValueError for dtypes and shapes that it does not
take.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.operands import (
    BLOCKS,
    TILES,
    block_scales,
    check_codes,
    check_flag,
    check_float32,
    check_floats,
    check_scales,
    tile_scales,
)
from pallas_kernels.quantize import gpu, reference, tpu
from pallas_kernels.quantize.reference import SMALLEST_MAX

__all__ = [
    "dequantize_blocks",
    "dequantize_tiles",
    "quantize_blocks",
    "quantize_blocks_both",
    "quantize_columns",
    "quantize_tiles",
    "quantize_tiles_and_columns",
    "retile",
    "rms_norm_quantize_tiles",
    "swiglu_quantize_tiles",
]

Quantized = tuple[jax.Array, jax.Array]


def quantize_tiles(
    x_MK: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
    smallest_max: float = SMALLEST_MAX,
) -> Quantized:
    """q_MK E4M3, s_MT float32: see `reference.quantize_tiles_reference`."""
    return _quantize("quantize_tiles", implementation, "x_MK", x_MK, power_of_two, smallest_max)


def quantize_columns(
    x_MK: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
    smallest_max: float = SMALLEST_MAX,
) -> Quantized:
    """q_KM E4M3, s_KR float32: see `reference.quantize_columns_reference`."""
    return _quantize("quantize_columns", implementation, "x_MK", x_MK, power_of_two, smallest_max)


def quantize_tiles_and_columns(
    x_MK: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
    smallest_max: float = SMALLEST_MAX,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q_MK, s_MT, q_KM, s_KR: see `reference.quantize_tiles_and_columns_reference`."""
    return _quantize(
        "quantize_tiles_and_columns", implementation, "x_MK", x_MK, power_of_two, smallest_max
    )


def quantize_blocks(
    w_NK: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
    smallest_max: float = SMALLEST_MAX,
) -> Quantized:
    """q_NK E4M3, s_BT float32: see `reference.quantize_blocks_reference`."""
    return _quantize("quantize_blocks", implementation, "w_NK", w_NK, power_of_two, smallest_max)


def quantize_blocks_both(
    w_IO: jax.Array, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_IO, q_OI E4M3, s_BT float32: see `reference.quantize_blocks_both_reference`."""
    operation = "quantize_blocks_both"
    check_floats(operation, "w_IO", w_IO, (-1,) * max(w_IO.ndim, 2))
    return _run(operation, implementation, w_IO)


def retile(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
    smallest_max: float = SMALLEST_MAX,
) -> Quantized:
    """q_KM E4M3, s_KR float32: see `reference.retile_reference`."""
    _check_tiles("retile", q_MK, s_MT)
    check_flag("retile", "power_of_two", power_of_two)
    return _run("retile", implementation, q_MK, s_MT, power_of_two, smallest_max)


def swiglu_quantize_tiles(
    h_M2F: jax.Array,
    weight_M1: jax.Array | None = None,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """q_MF E4M3, s_MT float32: see `reference.swiglu_quantize_tiles_reference`."""
    operation = "swiglu_quantize_tiles"
    check_floats(operation, "h_M2F", h_M2F, (-1, -1))
    M, width = h_M2F.shape
    if width % 2:
        raise ValueError(
            f"{operation}: h_M2F has {width} columns; allowed: an even number, gate columns and as "
            "many up columns"
        )
    if weight_M1 is not None:
        check_float32(operation, "weight_M1", weight_M1, (M, 1))
    check_flag(operation, "power_of_two", power_of_two)
    return _run(operation, implementation, h_M2F, weight_M1, power_of_two)


def rms_norm_quantize_tiles(
    x_MD: jax.Array,
    gain_D: jax.Array,
    epsilon: float,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """q_MD E4M3, s_MT float32: see `reference.rms_norm_quantize_tiles_reference`."""
    operation = "rms_norm_quantize_tiles"
    check_floats(operation, "x_MD", x_MD, (-1, -1))
    check_floats(operation, "gain_D", gain_D, x_MD.shape[1:])
    check_flag(operation, "power_of_two", power_of_two)
    return _run(operation, implementation, x_MD, gain_D, epsilon, power_of_two)


def dequantize_tiles(
    q_MK: jax.Array, s_MT: jax.Array, out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """x_MK in `out_dtype`: see `reference.dequantize_tiles_reference`."""
    _check_tiles("dequantize_tiles", q_MK, s_MT)
    return reference.dequantize_tiles_reference(q_MK, s_MT, out_dtype)


def dequantize_blocks(
    q_NK: jax.Array, s_BT: jax.Array, out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """w_NK in `out_dtype`: see `reference.dequantize_blocks_reference`."""
    check_codes("dequantize_blocks", "q_NK", q_NK, (-1, -1), BLOCKS)
    check_scales("dequantize_blocks", "s_BT", s_BT, BLOCKS, block_scales(q_NK))
    return reference.dequantize_blocks_reference(q_NK, s_BT, out_dtype)


_IMPLEMENTATIONS = {
    "quantize_tiles": {
        "hopper": gpu.quantize_tiles_hopper,
        "tpu": tpu.quantize_tiles_tpu,
        "reference": reference.quantize_tiles_reference,
    },
    "quantize_columns": {
        "hopper": gpu.quantize_columns_hopper,
        "tpu": tpu.quantize_columns_tpu,
        "reference": reference.quantize_columns_reference,
    },
    "quantize_tiles_and_columns": {
        "hopper": gpu.quantize_tiles_and_columns_hopper,
        "tpu": tpu.quantize_tiles_and_columns_tpu,
        "reference": reference.quantize_tiles_and_columns_reference,
    },
    "quantize_blocks": {
        "tpu": tpu.quantize_blocks_tpu,
        "reference": reference.quantize_blocks_reference,
    },
    "quantize_blocks_both": {
        "reference": reference.quantize_blocks_both_reference,
    },
    "retile": {
        "hopper": gpu.retile_hopper,
        "tpu": tpu.retile_tpu,
        "reference": reference.retile_reference,
    },
    "swiglu_quantize_tiles": {
        "hopper": gpu.swiglu_quantize_tiles_hopper,
        "tpu": tpu.swiglu_quantize_tiles_tpu,
        "reference": reference.swiglu_quantize_tiles_reference,
    },
    "rms_norm_quantize_tiles": {
        "tpu": tpu.rms_norm_quantize_tiles_tpu,
        "reference": reference.rms_norm_quantize_tiles_reference,
    },
}


def _quantize(operation, implementation, name, x_NK, power_of_two, smallest_max):
    check_floats(operation, name, x_NK, (-1, -1))
    check_flag(operation, "power_of_two", power_of_two)
    return _run(operation, implementation, x_NK, power_of_two, smallest_max)


def _check_tiles(operation, q_MK, s_MT):
    check_codes(operation, "q_MK", q_MK, (-1, -1), TILES)
    check_scales(operation, "s_MT", s_MT, TILES, tile_scales(q_MK))


def _run(operation, implementation, *args):
    return dispatch.call(operation, _IMPLEMENTATIONS[operation], implementation, *args)

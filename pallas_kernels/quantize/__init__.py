"""Quantisation to E4M3 with float32 scales: 1x128 and 128x1 tiles, 128x128 blocks."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.quantize import gpu, reference
from pallas_kernels.quantize.reference import (
    dequantize_blocks_reference as dequantize_blocks,
)
from pallas_kernels.quantize.reference import (
    dequantize_tiles_reference as dequantize_tiles,
)
from pallas_kernels.quantize.reference import (
    quantize_blocks_both_reference as quantize_blocks_both,
)
from pallas_kernels.quantize.reference import (
    quantize_blocks_reference as quantize_blocks,
)
from pallas_kernels.quantize.reference import (
    rms_norm_quantize_tiles_reference as rms_norm_quantize_tiles,
)

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
    x_MK: jax.Array, power_of_two: bool = False, implementation: str | None = None
) -> Quantized:
    """q_MK E4M3, s_MT float32: see `reference.quantize_tiles_reference`."""
    return _run("quantize_tiles", implementation, x_MK, power_of_two)


def quantize_columns(
    x_MK: jax.Array, power_of_two: bool = False, implementation: str | None = None
) -> Quantized:
    """q_KM E4M3, s_KR float32: see `reference.quantize_columns_reference`."""
    return _run("quantize_columns", implementation, x_MK, power_of_two)


def quantize_tiles_and_columns(
    x_MK: jax.Array, power_of_two: bool = False, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q_MK, s_MT, q_KM, s_KR: see `reference.quantize_tiles_and_columns_reference`."""
    return _run("quantize_tiles_and_columns", implementation, x_MK, power_of_two)


def retile(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """q_KM E4M3, s_KR float32: see `reference.retile_reference`."""
    return _run("retile", implementation, q_MK, s_MT, power_of_two)


def swiglu_quantize_tiles(
    h_M2F: jax.Array,
    weight_M1: jax.Array | None = None,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """q_MF E4M3, s_MT float32: see `reference.swiglu_quantize_tiles_reference`."""
    return _run("swiglu_quantize_tiles", implementation, h_M2F, weight_M1, power_of_two)


_IMPLEMENTATIONS = {
    "quantize_tiles": {
        "hopper": gpu.quantize_tiles_hopper,
        "reference": reference.quantize_tiles_reference,
    },
    "quantize_columns": {
        "hopper": gpu.quantize_columns_hopper,
        "reference": reference.quantize_columns_reference,
    },
    "quantize_tiles_and_columns": {
        "hopper": gpu.quantize_tiles_and_columns_hopper,
        "reference": reference.quantize_tiles_and_columns_reference,
    },
    "retile": {"hopper": gpu.retile_hopper, "reference": reference.retile_reference},
    "swiglu_quantize_tiles": {
        "hopper": gpu.swiglu_quantize_tiles_hopper,
        "reference": reference.swiglu_quantize_tiles_reference,
    },
}


def _run(operation, implementation, *args):
    return dispatch.call(operation, _IMPLEMENTATIONS[operation], implementation, *args)

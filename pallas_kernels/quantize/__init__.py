"""Quantisation to E4M3 with float32 scales: 1x128 and 128x1 tiles, 128x128 blocks."""

import jax

from pallas_kernels import dispatch
from pallas_kernels.quantize import reference
from pallas_kernels.quantize.reference import (
    dequantize_blocks_reference as dequantize_blocks,
)
from pallas_kernels.quantize.reference import (
    dequantize_tiles_reference as dequantize_tiles,
)
from pallas_kernels.quantize.reference import (
    quantize_blocks_reference as quantize_blocks,
)

__all__ = [
    "dequantize_blocks",
    "dequantize_tiles",
    "quantize_blocks",
    "quantize_columns",
    "quantize_tiles",
    "retile",
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


def retile(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> Quantized:
    """q_KM E4M3, s_KR float32: see `reference.retile_reference`."""
    return _run("retile", implementation, q_MK, s_MT, power_of_two)


_IMPLEMENTATIONS = {
    "quantize_tiles": {"reference": reference.quantize_tiles_reference},
    "quantize_columns": {"reference": reference.quantize_columns_reference},
    "retile": {"reference": reference.retile_reference},
}


def _run(operation, implementation, *args):
    return dispatch.call(operation, _IMPLEMENTATIONS[operation], implementation, *args)

"""Quantisation to E4M3 with float32 scales: 128x128 blocks of weights."""

from pallas_kernels.quantize.reference import (
    dequantize_blocks_reference as dequantize_blocks,
)
from pallas_kernels.quantize.reference import (
    quantize_blocks_reference as quantize_blocks,
)

__all__ = ["dequantize_blocks", "quantize_blocks"]

"""Pallas kernels, a folder an operation: `reference.py` specifies, `gpu.py` and `tpu.py` run."""

from pallas_kernels.fp8_matmul import fp8_matmul
from pallas_kernels.grouped_fp8_matmul import (
    grouped_fp8_matmul,
    grouped_fp8_weight_gradient,
    masked_fp8_matmul,
)
from pallas_kernels.pack import pack_rows, unpack_rows
from pallas_kernels.quantize import (
    dequantize_blocks,
    dequantize_tiles,
    quantize_blocks,
    quantize_blocks_both,
    quantize_columns,
    quantize_tiles,
    quantize_tiles_and_columns,
    retile,
    rms_norm_quantize_tiles,
    swiglu_quantize_tiles,
)

__all__ = [
    "dequantize_blocks",
    "dequantize_tiles",
    "fp8_matmul",
    "grouped_fp8_matmul",
    "grouped_fp8_weight_gradient",
    "masked_fp8_matmul",
    "pack_rows",
    "quantize_blocks",
    "quantize_blocks_both",
    "quantize_columns",
    "quantize_tiles",
    "quantize_tiles_and_columns",
    "retile",
    "rms_norm_quantize_tiles",
    "swiglu_quantize_tiles",
    "unpack_rows",
]

"""Pallas kernels, a folder an operation: `reference.py` specifies, `gpu.py` and `tpu.py` run."""

from pallas_kernels.quantize import dequantize_blocks, quantize_blocks

__all__ = ["dequantize_blocks", "quantize_blocks"]

"""Pallas kernels, a folder an operation: `reference.py` specifies, `gpu.py` and `tpu.py` run."""

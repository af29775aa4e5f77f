"""Pallas kernels, a folder an operation: `reference.py` is the specification, `gpu.py` and `tpu.py` the kernels."""

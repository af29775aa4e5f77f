"""Codes and scales of a row as one message: what FP8 dispatch sends of a token."""

from pallas_kernels.pack.reference import pack_rows_reference as pack_rows
from pallas_kernels.pack.reference import unpack_rows_reference as unpack_rows

__all__ = ["pack_rows", "unpack_rows"]

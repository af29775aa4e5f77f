"""Codes and scales of a row as one message: what FP8 dispatch sends of a token."""

import jax

from pallas_kernels.operands import TILES, check_codes, check_scales, tile_scales
from pallas_kernels.pack import reference

__all__ = ["check_payload", "pack_rows", "unpack_rows"]


def pack_rows(q_MK: jax.Array, s_MT: jax.Array) -> jax.Array:
    """payload_MW uint8: see `reference.pack_rows_reference`.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
    """
    check_codes("pack_rows", "q_MK", q_MK, (-1, -1), TILES)
    check_scales("pack_rows", "s_MT", s_MT, TILES, tile_scales(q_MK))
    return reference.pack_rows_reference(q_MK, s_MT)


def unpack_rows(payload_MW: jax.Array, K: int) -> tuple[jax.Array, jax.Array]:
    """q_MK and s_MT: see `reference.unpack_rows_reference`.

    Raises:
      ValueError: no rows of bytes, or of another length than K codes and their scales.
    """
    check_payload("unpack_rows", "payload_MW", payload_MW, K)
    return reference.unpack_rows_reference(payload_MW, K)


def check_payload(operation: str, name: str, payload_MW: jax.Array, K: int) -> None:
    """Raises ValueError unless these are messages of `pack_rows` with K codes each."""
    width = reference.row_bytes(K)
    if payload_MW.dtype != "uint8" or payload_MW.ndim != 2 or payload_MW.shape[1] != width:
        raise ValueError(
            f"{operation}: {name} is {payload_MW.dtype}{list(payload_MW.shape)}; allowed: "
            f"uint8[*, {width}], {K} codes a row and the bytes of their scales; make it with "
            "pack_rows(q_MK, s_MT)"
        )

"""Moving rows to the slots of their experts and summing them back: gathers, never a scatter-add.

Tokens are quantised where they are, before they are sent (spec §5.6), so that what is permuted is
codes: at V3's width a row of 7,392 bytes and not of 14,336. Their weights multiply inside SwiGLU
(spec §3, step 6), so that the sum on the way back is plain. Every result has one writer and one
order of sums: the same bits in every run.
"""

import jax

from pallas_kernels import dispatch
from pallas_kernels.moe_permute.gpu import permute_packed_rows_hopper, unpermute_sum_hopper
from pallas_kernels.moe_permute.reference import (
    permute_packed_rows_reference,
    unpermute_sum_reference,
)
from pallas_kernels.pack import check_payload

__all__ = ["permute_packed_rows", "unpermute_sum"]

_PERMUTE = {"hopper": permute_packed_rows_hopper, "reference": permute_packed_rows_reference}
_UNPERMUTE = {"hopper": unpermute_sum_hopper, "reference": unpermute_sum_reference}


def permute_packed_rows(
    payload_RW: jax.Array, row_M: jax.Array, width: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of the row that each slot holds, from messages of `pack_rows`.

    Args:
      payload_RW: uint8, W = width + 4 ceil(width / 128).
      row_M: int32 source row of each slot; >= R: the slot is empty.
      width: D.
      implementation: 'reference' or 'hopper'; None: the best that accepts the operands.

    Returns:
      q_MD float8_e4m3fn and s_MT float32, zeros in an empty slot.

    Raises:
      ValueError: messages of another length.
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    check_payload("permute_packed_rows", "payload_RW", payload_RW, width)
    operands = (payload_RW, row_M, width)
    return dispatch.call("permute_packed_rows", _PERMUTE, implementation, *operands)


def unpermute_sum(
    y_MD: jax.Array, slot_XK: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """[X, D]: the sum of each row's slots, added in float32 in the order of K, in y's dtype.

    Args:
      slot_XK: int32 slots of each row; >= M: none.
      implementation: as above.

    Raises:
      NotImplementedError: the implementation named does not take these operands, and why.
    """
    return dispatch.call("unpermute_sum", _UNPERMUTE, implementation, y_MD, slot_XK)

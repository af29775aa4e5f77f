"""Rows into the slots of their experts, and back, in plain jax.numpy (spec §3, §5.6).

Letters: R received rows, X rows that get a sum, M slots, K slots a row, D width, W bytes of a
message, T tiles of 128 columns.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pack.reference import unpack_rows_reference


def permute_packed_rows_reference(
    payload_RW: jax.Array, row_M: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """See `permute_packed_rows`."""
    payload_MW = payload_RW.at[row_M].get(mode="fill", fill_value=0)
    return unpack_rows_reference(payload_MW, width)


def unpermute_sum_reference(y_MD: jax.Array, slot_XK: jax.Array) -> jax.Array:
    """See `unpermute_sum`."""
    # K gathers and adds, which fuse into one pass, instead of a [X, K, D] array and its reduction.
    total_XD = jnp.zeros((slot_XK.shape[0], *y_MD.shape[1:]), jnp.float32)
    for slot_X in slot_XK.T:
        total_XD += y_MD.at[slot_X].get(mode="fill", fill_value=0)
    return total_XD.astype(y_MD.dtype)

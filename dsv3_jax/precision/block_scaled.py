"""FP8 weights as they are released: E4M3 codes and a float32 scale a 128x128 block (spec §5.1).

A `BlockScaled` stands where a weight array would: it is turned into the compute dtype where a
matmul would cast a master weight. Letters: I and O widths in and out of a kernel; N rows and K
columns of a stored [out, in] matrix, B and T its blocks along them.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv3_jax.errors import UserError
from pallas_kernels import dequantize_blocks, quantize_blocks
from pallas_kernels.quantize.reference import BLOCK, E4M3_MAX

# Every E4M3 code as float32: looking codes up is several times faster than numpy's cast.
_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales"],
    meta_fields=["segments"],
)
@dataclass(frozen=True)
class BlockScaled:
    """A kernel [..., I, O] kept in FP8: codes * scales. One byte a weight; it does not train."""

    codes: jax.Array  # float8_e4m3fn [..., I, O]
    scales: jax.Array  # float32 [..., ceil(I/128), segments * ceil(O/segments/128)]; they multiply
    segments: int = 1  # column ranges blocked one by one: 2 for the fused gate and up projections

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.codes.dtype

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    def __getitem__(self, index: Any) -> "BlockScaled":
        """Of leading dims (layer, expert), or `[...]`: blocks cannot be cut."""
        taken = BlockScaled(self.codes[index], self.scales[index], self.segments)
        assert taken.shape[-2:] == self.shape[-2:], index
        return taken

    def astype(self, dtype: jnp.dtype) -> jax.Array:
        """codes * scales in float32, rounded once to `dtype`."""

        def dequantize(codes, scales):
            return dequantize_blocks(codes, scales, dtype)

        for _ in range(self.ndim - 2):
            dequantize = jax.vmap(dequantize)
        codes = jnp.split(self.codes, self.segments, axis=-1)
        scales = jnp.split(self.scales, self.segments, axis=-1)
        return jnp.concatenate(list(map(dequantize, codes, scales)), axis=-1)


def refuse_gradient(kernel: Any) -> None:
    """Raises UserError for a weight that no gradient can reach."""
    if isinstance(kernel, BlockScaled):
        raise UserError(
            "weights kept in FP8 do not train; load them with dtype=jnp.float32 or jnp.bfloat16"
        )


def dequantize_on_host(
    codes_NK: np.ndarray,
    scales_BT: np.ndarray,
    dtype: np.dtype,
    first_row: int = 0,
    first_column: int = 0,
) -> np.ndarray:
    """`dequantize_blocks` of any part of a matrix, in numpy.

    Args:
      codes_NK: float8_e4m3fn, the part.
      scales_BT: float32, of the whole matrix.
      first_row, first_column: of the part in the matrix; blocks need not begin there.
    """
    rows_N = (first_row + np.arange(codes_NK.shape[0])) // BLOCK
    columns_K = (first_column + np.arange(codes_NK.shape[1])) // BLOCK
    w_NK = _VALUES[codes_NK.view(np.uint8)]
    w_NK *= scales_BT[:, columns_K][rows_N]
    return w_NK.astype(dtype, copy=False)


def requantize_blocks(w_NK: jax.Array, s_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`quantize_blocks`, but blocks that come unchanged from FP8 get their codes and scale back.

    Args:
      w_NK: weights of any float dtype.
      s_BT: the scales that the blocks had. A block keeps its scale when some codes times it give
        every weight bit for bit, which says nothing about a weight that was trained: such a block
        gets the scale of its own maximum.

    Returns:
      q_NK float8_e4m3fn and the float32 scales.
    """
    new_q_NK, new_s_BT = quantize_blocks(w_NK)
    wide_s_NK = _widen(s_BT, w_NK.shape)
    q_NK = jnp.clip(w_NK.astype(jnp.float32) / wide_s_NK, -E4M3_MAX, E4M3_MAX)
    # The barrier keeps XLA from dropping the cast there and back.
    q_NK = jax.lax.optimization_barrier(q_NK.astype(jnp.float8_e4m3fn))
    same_NK = _bits(dequantize_blocks(q_NK, s_BT, w_NK.dtype)) == _bits(w_NK)
    same_NK &= ~jnp.isnan(w_NK)  # NaN comes back as itself too, but must not pass
    padding = [(0, -dim % BLOCK) for dim in w_NK.shape]
    same_NK = jnp.pad(same_NK, padding, constant_values=True)
    blocks = (s_BT.shape[0], BLOCK, s_BT.shape[1], BLOCK)
    same_BT = same_NK.reshape(blocks).all(axis=(1, 3))
    codes_NK = jnp.where(_widen(same_BT, w_NK.shape), _bits(q_NK), _bits(new_q_NK))
    return (
        jax.lax.bitcast_convert_type(codes_NK, jnp.float8_e4m3fn),
        jnp.where(same_BT, s_BT, new_s_BT),
    )


def _widen(x_BT: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Every block's value at every weight of the block."""
    return jnp.repeat(jnp.repeat(x_BT, BLOCK, axis=0), BLOCK, axis=1)[: shape[0], : shape[1]]


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

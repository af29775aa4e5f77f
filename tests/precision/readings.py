"""The FP8 recipe of spec §5.1 read in numpy: what operands become, in float64."""

import numpy as np

from pallas_kernels import checking


def quantized(x, rows, columns, power_of_two=False):
    """x after quantisation with a scale a block of rows x columns (None: the whole dim)."""
    codes, scales = checking.quantize(x, rows, columns, power_of_two)
    return checking.dequantize(codes, scales, rows, columns)


def linear(x_MI, w_IO, dy_MO, power_of_two=False, gradient_rows=1, tile=128):
    """y, dx and dw of one Linear; `tile=None` is a scale a tensor.

    Args:
      gradient_rows: rows that share a scale in Dgrad.
    """
    one = 1 if tile else None
    x_MI = quantized(x_MI, one, tile, power_of_two)
    w_IO = quantized(w_IO, tile, tile)
    dy_tiles_MO = quantized(dy_MO, one and gradient_rows, tile)
    # The float32 product of a code and its scale is what the re-tiling quantises again.
    x_columns_MI = quantized(x_MI, tile, one, power_of_two)
    dy_columns_MO = quantized(dy_MO, tile, one)
    return x_MI @ w_IO, dy_tiles_MO @ w_IO.T, x_columns_MI.T @ dy_columns_MO


def draw(rng, *shape):
    """Activations whose magnitude differs from row to row and from column to column."""
    x = rng.normal(size=shape)
    return x * np.exp(rng.normal(size=(shape[0], 1))) * np.exp(rng.normal(size=shape[-1]))


def assert_close(actual, expected, relative):
    """|actual - expected| <= relative * (rms of the row + |expected|)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    size = np.sqrt((expected**2).mean(-1, keepdims=True)) + np.abs(expected)
    error = np.abs(actual - expected) / np.maximum(size, 1e-30)
    assert error.max() <= relative, error.max()

"""Inputs that quantisation goes wrong on first."""

import ml_dtypes
import numpy as np


def hard_matrix(rng, shape, dtype, finite=False):
    """Outliers, tiles of zeros and of float32 subnormals, -0, and unless `finite` NaN and inf."""
    M, K = shape
    x_MK = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 3)

    def somewhere(count=1):
        return rng.integers(M, size=count), rng.integers(K, size=count)

    x_MK[somewhere(3)] *= 1e4
    x_MK[somewhere(5)] = -0.0
    zeros, subnormals = rng.integers(0, 3, 2)  # blocks of 128 columns, which may not exist
    x_MK[: M // 2, zeros * 128 : zeros * 128 + 128] = 0
    x_MK[M // 2 :, subnormals * 128 : subnormals * 128 + 128] = 1e-40
    if not finite:
        x_MK[somewhere(rng.integers(3))] = np.nan
        x_MK[somewhere(rng.integers(3))] = rng.choice([-np.inf, np.inf])
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.where(np.isinf(x_MK), x_MK, np.clip(x_MK, -largest, largest)).astype(dtype)

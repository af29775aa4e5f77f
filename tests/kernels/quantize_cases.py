"""Inputs that quantisation goes wrong on first, and what numpy and ml_dtypes make of them."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


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


def tiles_by_numpy(x_MK, power_of_two=False):
    """Tile after tile: codes [M, K] and scales [M, T]."""
    x_MK = np.asarray(x_MK).astype(np.float32)
    M, K = x_MK.shape
    q_MK = np.empty((M, K), E4M3)
    s_MT = np.empty((M, -(-K // 128)), np.float32)
    for m, t in np.ndindex(*s_MT.shape):
        tile = np.s_[m, t * 128 : t * 128 + 128]
        q_MK[tile], s_MT[m, t] = one_tile(x_MK[tile], power_of_two)
    return q_MK, s_MT


def one_tile(x_C, power_of_two):
    if not np.isfinite(x_C).all():
        return np.full(x_C.shape, np.nan, E4M3), np.nan
    scale = max(np.abs(x_C).max(), np.float32(1e-4)) / np.float32(448)
    if power_of_two:
        fraction, exponent = np.frexp(scale)  # fraction in [0.5, 1)
        scale = np.ldexp(np.float32(1), exponent - int(fraction == 0.5))
    return np.clip(x_C / scale, -448, 448).astype(E4M3), scale


def assert_same(actual, expected):
    """Same bits, but any NaN equals any other."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype and a.shape == e.shape
        a, e = a.astype(np.float32), e.astype(np.float32)
        np.testing.assert_array_equal(a, e)
        number = ~np.isnan(e)
        np.testing.assert_array_equal(np.signbit(a[number]), np.signbit(e[number]))

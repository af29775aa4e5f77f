"""E5M6 against a reading of its definition in Python's own numbers, bit for bit."""

from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.precision.formats import pack_e5m6, unpack_e5m6

# Every non-negative finite value of the format, ascending: the index is the code.
VALUES = [
    Fraction(mantissa + (64 if exponent else 0), 64) * Fraction(2) ** (max(exponent, 1) - 15)
    for exponent in range(31)
    for mantissa in range(64)
]


def expected_row(x_K):
    """(codes, exponents, values) of one row, by exact rational arithmetic and search."""
    codes, exponents, values = [], [], []
    for start in range(0, len(x_K), 128):
        tile = [float(x) for x in x_K[start : start + 128]]
        if not np.isfinite(tile).all():
            exponents.append(255)
            codes += [None] * len(tile)
            values += [np.nan] * len(tile)
            continue
        largest = max(map(abs, tile))
        exponent = max(int(np.frexp(largest)[1]) - 1 + 127 if largest else 0, 15)
        scale = Fraction(2) ** (exponent - 127 - 14)
        exponents.append(exponent)
        for x in tile:
            magnitude = abs(Fraction(x)) / scale
            above = int(np.searchsorted(np.array(VALUES, object), magnitude))
            pair = [code for code in (above - 1, above) if 0 <= code < len(VALUES)]
            nearest = min(pair, key=lambda code: (abs(VALUES[code] - magnitude), code % 2))
            codes.append(nearest | (2048 if np.signbit(x) else 0))
            values.append(float(np.copysign(float(VALUES[nearest] * scale), x)))
    return codes, exponents, values


def codes_of(bytes_C, width):
    half = -(-width // 2)
    low, high = np.asarray(bytes_C, int)[: 2 * half], np.asarray(bytes_C, int)[2 * half :]
    return (low + 256 * np.concatenate([high % 16, high // 16]))[:width]


def draw(rng, rows, width, dtype):
    x = rng.normal(size=(rows, width)) * 2.0 ** rng.integers(-40, 20, size=(rows, 1))
    x *= 2.0 ** rng.integers(-32, 1, size=x.shape)  # down to the subnormals of a tile
    x[rng.random(x.shape) < 0.05] = 0
    ties = np.ldexp(rng.integers(129, 256, size=x.shape) * 1.0, -8)  # 8 bits: half are ties
    return np.where(rng.random(x.shape) < 0.3, np.copysign(ties, x), x).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("width", [1, 2, 77, 128, 131, 384])
def test_codes_scales_and_values_equal_the_definition(width, dtype):
    rng = np.random.default_rng()
    x_MK = draw(rng, 6, width, dtype)
    x_MK[1] = 0
    x_MK[2, rng.integers(width)] = rng.choice([np.nan, np.inf, -np.inf])
    bytes_MC, exponents_MT = jax.jit(pack_e5m6)(x_MK)
    assert bytes_MC.dtype == exponents_MT.dtype == jnp.uint8
    assert bytes_MC.shape == (6, 3 * -(-width // 2))
    restored = {
        out: jax.jit(partial(unpack_e5m6, width=width, dtype=out))(bytes_MC, exponents_MT)
        for out in (jnp.float32, jnp.bfloat16)
    }
    for row, x_K in enumerate(x_MK.astype(np.float32)):
        codes, exponents, values = expected_row(x_K)
        np.testing.assert_array_equal(exponents_MT[row], exponents)
        for code, expected in zip(codes_of(bytes_MC[row], width), codes, strict=True):
            assert expected is None or code == expected
        for restored_MK in restored.values():  # 7 significant bits: bfloat16 holds them too
            np.testing.assert_array_equal(np.asarray(restored_MK[row], np.float64), values)


def test_largest_magnitudes_neither_overflow_nor_round_away():
    limit = np.finfo(np.float32).max
    x_MK = np.array([[limit, -limit], [2.0**-112, 2.0**-120], [65535.0, -1.0]], np.float32)
    restored = unpack_e5m6(*pack_e5m6(x_MK), width=2, dtype=jnp.float32)
    expected = [[np.inf, -np.inf], [2.0**-112, 2.0**-120], [65536.0, -1.0]]
    # float32's largest number rounds up to 2^128: the same overflow as in a cast to bfloat16.
    np.testing.assert_array_equal(restored, expected)


def test_leading_dims_are_free_and_rounding_twice_changes_nothing():
    x_BTK = draw(np.random.default_rng(), 12, 200, np.float32).reshape(3, 4, 200)
    bytes_BTC, exponents_BTT = pack_e5m6(x_BTK)
    assert bytes_BTC.shape == (3, 4, 300) and exponents_BTT.shape == (3, 4, 2)
    once = unpack_e5m6(bytes_BTC, exponents_BTT, 200, jnp.float32)
    again = unpack_e5m6(*pack_e5m6(once), 200, jnp.float32)
    # Where the largest magnitude rounded up to a power of two, the scale of a second rounding
    # doubles and its subnormals are coarser.
    largest_BTT = np.abs(np.pad(once, ((0, 0), (0, 0), (0, 56)))).reshape(3, 4, 2, 128).max(-1)
    same_BTT = np.frexp(largest_BTT)[1] - 1 + 127 == exponents_BTT
    assert same_BTT.sum() > 12
    same_BTK = np.repeat(same_BTT, 128, axis=-1)[..., :200]
    np.testing.assert_array_equal(once[same_BTK], again[same_BTK])
    rows = pack_e5m6(x_BTK.reshape(12, 200))
    np.testing.assert_array_equal(bytes_BTC.reshape(12, -1), rows[0])

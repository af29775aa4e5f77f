"""What results are compared with: spec §5.1 to §5.3 read in numpy, and how far they are from it.

Codes and scales are read in float32, as they are defined; products are float64 sums. Tests and
benchmarks share these; nothing here is computed by JAX. Letters as in `fp8_matmul.reference` and
`grouped_fp8_matmul.reference`.
"""

import ml_dtypes
import numpy as np

from pallas_kernels.quantize.reference import BLOCK

E4M3 = ml_dtypes.float8_e4m3fn


def quantize(
    x_NK: np.ndarray, rows: int | None, columns: int | None = BLOCK, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """q_NK E4M3, and a float32 scale a block of rows x columns (None: the whole dim).

    A block that holds NaN or infinity has the scale NaN and NaN codes.
    """
    x_NK = np.asarray(x_NK).astype(np.float32)
    N, K = x_NK.shape
    x_BRTC = _in_blocks(x_NK, rows or N, columns or K)
    max_BT = np.maximum(np.abs(x_BRTC).max((1, 3)), np.float32(1e-4))
    s_BT = np.where(np.isfinite(max_BT), max_BT, np.nan) / np.float32(448)
    if power_of_two:
        fraction_BT, exponent_BT = np.frexp(s_BT)  # fraction in [0.5, 1)
        up_BT = np.ldexp(np.float32(1), exponent_BT - (fraction_BT == 0.5))
        s_BT = np.where(np.isnan(s_BT), s_BT, up_BT)
    q_BRTC = np.clip(x_BRTC / s_BT[:, None, :, None], -448, 448).astype(E4M3)
    B, R, T, C = q_BRTC.shape
    return q_BRTC.reshape(B * R, T * C)[:N, :K], s_BT


def dequantize(
    q_NK: np.ndarray, s_BT: np.ndarray, rows: int | None, columns: int | None = BLOCK
) -> np.ndarray:
    """x_NK float64, from what `quantize` returned."""
    N, K = q_NK.shape
    s_NK = np.repeat(np.repeat(_float64(s_BT), rows or N, 0), columns or K, 1)[:N, :K]
    return _float64(q_NK) * s_NK


def product(q_MK: np.ndarray, s_MT: np.ndarray, q_NK: np.ndarray, s_BT: np.ndarray) -> np.ndarray:
    """y_MN float64: the sum of scaled partial products; `s_BT` of blocks or of rows."""
    q_MK, s_MT, q_NK, s_NT = map(_float64, (q_MK, s_MT, q_NK, s_BT))
    if len(s_NT) != len(q_NK):
        s_NT = np.repeat(s_NT, BLOCK, axis=0)[: len(q_NK)]
    y_MN = np.zeros((len(q_MK), len(q_NK)))
    for t in range(s_MT.shape[1]):
        tile = np.s_[:, t * BLOCK : (t + 1) * BLOCK]
        y_MN += q_MK[tile] @ q_NK[tile].T * s_MT[:, t, None] * s_NT[:, t]
    return y_MN


def magnitude(q_MK: np.ndarray, s_MT: np.ndarray, q_NK: np.ndarray, s_BT: np.ndarray) -> np.ndarray:
    """`product` of the magnitudes: what rounding errors of a sum are in proportion to."""
    return product(np.abs(_float64(q_MK)), s_MT, np.abs(_float64(q_NK)), s_BT)


def grouped_product(
    q_MK: np.ndarray,
    s_MT: np.ndarray,
    q_GNK: np.ndarray,
    s_GBT: np.ndarray,
    group_sizes_G: np.ndarray,
) -> np.ndarray:
    """y_MN float64, zeros in the rows after the last group."""
    y_MN = np.zeros((len(q_MK), q_GNK.shape[1]))
    for g, rows in enumerate(_ranges(group_sizes_G)):
        y_MN[rows] = product(q_MK[rows], s_MT[rows], q_GNK[g], s_GBT[g])
    return y_MN


def grouped_weight_gradient(
    q_IM: np.ndarray,
    s_IR: np.ndarray,
    q_OM: np.ndarray,
    s_OR: np.ndarray,
    group_sizes_G: np.ndarray,
) -> np.ndarray:
    """dw_GIO float64."""
    dw_GIO = np.zeros((len(group_sizes_G), len(q_IM), len(q_OM)))
    for g, rows in enumerate(_ranges(group_sizes_G)):
        tiles = np.s_[rows.start // BLOCK : rows.stop // BLOCK]
        dw_GIO[g] = product(q_IM[:, rows], s_IR[:, tiles], q_OM[:, rows], s_OR[:, tiles])
    return dw_GIO


def masked_product(
    q_GMK: np.ndarray,
    s_GMT: np.ndarray,
    q_GNK: np.ndarray,
    s_GBT: np.ndarray,
    num_rows_G: np.ndarray,
) -> np.ndarray:
    """y_GMN float64, zeros in the rows that are not real."""
    y_GMN = np.zeros((*q_GMK.shape[:2], q_GNK.shape[1]))
    for g, n in enumerate(num_rows_G):
        y_GMN[g, :n] = product(q_GMK[g, :n], s_GMT[g, :n], q_GNK[g], s_GBT[g])
    return y_GMN


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||; NaN or infinity, which no bound admits, if any of
    `actual` is no finite number, and infinity if `expected` is zero and `actual` is not.
    """
    actual, expected = _float64(actual), _float64(expected)
    error, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    if size == 0:
        return 0.0 if error == 0 else np.inf
    return float(error / size)


def difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2), by which FP8 products are accepted (spec §5.7)."""
    actual, expected = _float64(actual), _float64(expected)
    return float(1 - 2 * (actual * expected).sum() / (actual**2 + expected**2).sum())


def assert_same(actual: tuple, expected: tuple) -> None:
    """Same dtypes, shapes and bits, but any NaN equals any other."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert a.dtype == e.dtype and a.shape == e.shape, (a.dtype, a.shape, e.dtype, e.shape)
        a, e = a.astype(np.float32), e.astype(np.float32)
        np.testing.assert_array_equal(a, e)
        number = ~np.isnan(e)
        np.testing.assert_array_equal(np.signbit(a[number]), np.signbit(e[number]))


def _in_blocks(x_NK: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """[B, rows, T, columns], ragged edges filled with zeros."""
    N, K = x_NK.shape
    x_NK = np.pad(x_NK, ((0, -N % rows), (0, -K % columns)))
    return x_NK.reshape(len(x_NK) // rows, rows, x_NK.shape[1] // columns, columns)


def _float64(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _ranges(sizes_G: np.ndarray) -> list[slice]:
    """The rows of every group."""
    ends_G = np.cumsum(sizes_G)
    return [slice(end - size, end) for size, end in zip(sizes_G, ends_G, strict=True)]

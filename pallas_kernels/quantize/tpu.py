"""TPU: quantisation in one pass over memory, a patch of 128x128 at a time.

Kernels write the scales of columns as [R, K] and callers get the transpose, which XLA cancels with
that of the product.

Letters: M or N rows and K columns (F behind a gated unit, D of a norm) of a matrix, R or B and T
tiles of 128 along them; J rows and C columns that a step holds, L lanes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize.reference import BLOCK, SMALLEST_MAX, gated, scales
from pallas_kernels.tpu_gemm import LANES, block_of_lanes, refuse_float16, rolled, whole_lanes

Arrays = tuple[jax.Array, ...]
Operand = tuple[jax.Array, pl.BlockSpec]
E4M3 = jnp.float8_e4m3fn


@dataclass(frozen=True)
class Config:
    """What a step holds: multiples of 128, the columns times a power of two up to 16384."""

    rows: int = 256
    columns: int = 512


DEFAULT = Config()


def quantize_tiles_tpu(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `quantize_tiles_reference`."""
    return _of_matrix(x_MK, ["tiles"], power_of_two, smallest_max, config, interpret)


def quantize_columns_tpu(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `quantize_columns_reference`."""
    return _of_matrix(x_MK, ["columns"], power_of_two, smallest_max, config, interpret)


def quantize_tiles_and_columns_tpu(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `quantize_tiles_and_columns_reference`."""
    return _of_matrix(x_MK, ["tiles", "columns"], power_of_two, smallest_max, config, interpret)


def quantize_blocks_tpu(
    w_NK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `quantize_blocks_reference`."""
    return _of_matrix(w_NK, ["blocks"], power_of_two, smallest_max, config, interpret)


def retile_tpu(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `retile_reference`."""

    def dequantized(tile, q_JC, s_JL):
        return _plain(tile, q_JC) * rolled(s_JL, _number(tile, config))[:, :1]

    lanes = pl.BlockSpec((config.rows, LANES), lambda m, k: (m, block_of_lanes(k, config.columns)))
    operands = [_patches(q_MK, config), (whole_lanes(s_MT), lanes)]
    scale = partial(scales, power_of_two=power_of_two, smallest_max=smallest_max)
    return _launch(dequantized, operands, q_MK.shape, ["columns"], scale, config, interpret)


def swiglu_quantize_tiles_tpu(
    h_M2F: jax.Array,
    weight_M1: jax.Array | None = None,
    power_of_two: bool = False,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `swiglu_quantize_tiles_reference`, but for the last bits of the exponential."""
    M, F = h_M2F.shape[0], h_M2F.shape[1] // 2

    def product(tile, gate_JC, up_JC, *weight_J1):
        gate, up, weight = _plain(tile, gate_JC), _plain(tile, up_JC), [w[...] for w in weight_J1]
        return gated(gate, up, *weight).astype(h_M2F.dtype).astype(jnp.float32)

    if F % config.columns:
        operands = [_patches(half_MF, config) for half_MF in jnp.split(h_M2F, 2, axis=1)]
    else:
        operands = [_patches(h_M2F, config), _patches(h_M2F, config, F // config.columns)]
    if weight_M1 is not None:
        operands.append(_a_row(weight_M1, config))
    scale = partial(scales, power_of_two=power_of_two, smallest_max=SMALLEST_MAX)
    return _launch(product, operands, (M, F), ["tiles"], scale, config, interpret)


def rms_norm_quantize_tiles_tpu(
    x_MD: jax.Array,
    gain_D: jax.Array,
    epsilon: float,
    power_of_two: bool = False,
    config: Config = DEFAULT,
    interpret: bool = False,
) -> Arrays:
    """As `rms_norm_quantize_tiles_reference`; XLA takes the means, in a pass before."""
    x32_MD = x_MD.astype(jnp.float32)
    inverse_M1 = lax.rsqrt(jnp.mean(x32_MD * x32_MD, axis=-1, keepdims=True) + epsilon)

    def normed(tile, x_JC, inverse_J1, gain_1C):
        x_JC = _plain(tile, x_JC) * inverse_J1[...] * _plain(tile, gain_1C)
        return x_JC.astype(x_MD.dtype).astype(jnp.float32)

    gain = pl.BlockSpec((1, config.columns), lambda m, k: (0, k))
    operands = [_patches(x_MD, config), _a_row(inverse_M1, config), (gain_D[None], gain)]
    scale = partial(scales, power_of_two=power_of_two, smallest_max=SMALLEST_MAX)
    return _launch(normed, operands, x_MD.shape, ["tiles"], scale, config, interpret)


def _of_matrix(x_MK, layouts, power_of_two, smallest_max, config, interpret):
    scale = partial(scales, power_of_two=power_of_two, smallest_max=smallest_max)
    operands = [_patches(x_MK, config)]
    return _launch(_plain, operands, x_MK.shape, layouts, scale, config, interpret)


def _patches(x_MK: jax.Array, config: Config, first: int = 0) -> Operand:
    """A matrix, from patch `first` of its columns on."""
    return x_MK, pl.BlockSpec((config.rows, config.columns), lambda m, k: (m, first + k))


def _a_row(x_M1: jax.Array, config: Config) -> Operand:
    return x_M1, pl.BlockSpec((config.rows, 1), lambda m, k: (m, 0))


def _plain(tile: int, x_JC: jax.Ref) -> jax.Array:
    return x_JC[:, _span(tile)].astype(jnp.float32)


def _launch(
    values: Callable[..., jax.Array],
    operands: list[Operand],
    shape: tuple[int, int],
    layouts: list[str],
    scale: Callable[..., jax.Array],
    config: Config,
    interpret: bool,
) -> Arrays:
    """Codes and scales of a matrix of `shape` in every layout.

    Args:
      values: (tile, *refs of operands) -> float32 [J, 128], the columns of a tile of a step.
      layouts: of 'tiles' (1x128), 'columns' (128x1, transposed) and 'blocks' (128x128).
      scale: `scales`, but for the maxima and the division.

    Raises:
      NotImplementedError: values in float16.
    """
    refuse_float16("the matrix", operands[0][0].dtype)
    (M, K), rows, columns = shape, config.rows, config.columns
    R, T = pl.cdiv(M, BLOCK), pl.cdiv(K, BLOCK)
    groups, lanes = (pl.cdiv(M, rows), rows // BLOCK), min(T, LANES)
    codes = (M, K), pl.BlockSpec((rows, columns), lambda m, k: (m, k))
    results = {
        "tiles": (
            codes,
            ((M, T), pl.BlockSpec((rows, lanes), lambda m, k: (m, block_of_lanes(k, columns)))),
        ),
        "columns": (
            ((K, M), pl.BlockSpec((columns, rows), lambda m, k: (k, m))),
            ((*groups, K), pl.BlockSpec((None, groups[1], columns), lambda m, k: (m, 0, k))),
        ),
        "blocks": (
            codes,
            (
                (*groups, T),
                pl.BlockSpec(
                    (None, groups[1], lanes), lambda m, k: (m, 0, block_of_lanes(k, columns))
                ),
            ),
        ),
    }
    results = [result for layout in layouts for result in results[layout]]
    out_shape = [
        jax.ShapeDtypeStruct(shape, jnp.float32 if i % 2 else E4M3)
        for i, (shape, _) in enumerate(results)
    ]
    encode = partial(_encode, scale=scale)

    def kernel(*refs):
        inputs, outputs = refs[: len(operands)], refs[len(operands) :]
        for tile in range(columns // BLOCK):
            x_JC = values(tile, *inputs)
            if M % rows or K % columns:
                first = pl.program_id(0) * rows, pl.program_id(1) * columns + tile * BLOCK
                j, c = (lax.broadcasted_iota(jnp.int32, x_JC.shape, dim) for dim in (0, 1))
                x_JC = jnp.where((j < M - first[0]) & (c < K - first[1]), x_JC, 0)
            for layout, q, s in zip(layouts, outputs[::2], outputs[1::2], strict=True):
                _WRITE[layout](x_JC, tile, q, s, encode, _number(tile, config))

    if M * K == 0:
        outputs = [jnp.zeros(out.shape, out.dtype) for out in out_shape]
    else:
        outputs = pl.pallas_call(
            kernel,
            out_shape=out_shape,
            grid=(groups[0], pl.cdiv(K, columns)),
            in_specs=[spec for _, spec in operands],
            out_specs=[spec for _, spec in results],
            # The scales of a row are gathered over the steps along K.
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            interpret=interpret,
        )(*(array for array, _ in operands))

    def whole(i, x):
        """Scales without their groups; the others as they are."""
        layout = layouts[i // 2]
        if i % 2 == 0 or layout == "tiles":
            return x
        x = x.reshape(groups[0] * groups[1], x.shape[2])[:R]
        return x.T if layout == "columns" else x

    return tuple(whole(i, x) for i, x in enumerate(outputs))


def _write_tiles(x_JC, tile, q, s, encode, number):
    x_JC, s_J1 = encode(x_JC, (1,))
    q[:, _span(tile)] = x_JC.astype(E4M3)
    _put(s, slice(None), s_J1, number)


def _write_columns(x_JC, tile, q, s, encode, number):
    for r in range(x_JC.shape[0] // BLOCK):
        x_RC, s_1C = encode(x_JC[_span(r)], (0,))
        q[_span(tile), _span(r)] = x_RC.T.astype(E4M3)
        s[r : r + 1, _span(tile)] = s_1C


def _write_blocks(x_JC, tile, q, s, encode, number):
    for r in range(x_JC.shape[0] // BLOCK):
        x_RC, s_11 = encode(x_JC[_span(r)], (0, 1))
        q[_span(r), _span(tile)] = x_RC.astype(E4M3)
        _put(s, slice(r, r + 1), s_11, number)


_WRITE = {"tiles": _write_tiles, "columns": _write_columns, "blocks": _write_blocks}


def _put(s_JL: jax.Ref, rows: slice, s_J1: jax.Array, number: jax.Array) -> None:
    """The scales of tile `number` in its lane: lanes are not addressed one by one."""
    lane = lax.broadcasted_iota(jnp.int32, s_JL[rows].shape, 1)
    s_JL[rows] = jnp.where(lane == number & (LANES - 1), s_J1, s_JL[rows])


def _span(tile: int) -> slice:
    return slice(tile * BLOCK, (tile + 1) * BLOCK)


def _number(tile: int, config: Config) -> jax.Array:
    """Of all tiles along K, the number of a step's."""
    return pl.program_id(1) * (config.columns // BLOCK) + tile


def _encode(x: jax.Array, dims: tuple[int, ...], scale: Callable[..., jax.Array]) -> Arrays:
    """Quotients to be cast, at most 448, and the scales of tiles along `dims`."""
    # As integers magnitudes have the same order, with NaN last.
    bits = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFFFF
    for dim in dims:
        bits = jnp.max(bits, axis=dim, keepdims=True)
    s = scale(lax.bitcast_convert_type(bits, jnp.float32), divide=_quotient)
    return _quotient(x, s), s


def _quotient(x: jax.Array, y: jax.Array | float) -> jax.Array:
    y = jnp.full_like(x, y) if isinstance(y, float) else y
    return quotient(x, y, 1 / y)


def quotient(x: jax.Array, y: jax.Array, inverse: jax.Array) -> jax.Array:
    """x / y rounded once, from the inverse of y: x * inverse, which the chip divides by, is twice.

    The error of that product is exact in products of halves of the digits, and is taken away once;
    with its sign turned, so that -0 stays.
    """
    q = x * inverse
    (q_high, q_low), (y_high, y_low) = _halves(q), _halves(y)
    error = q_high * y_high - x + q_high * y_low + q_low * y_high + q_low * y_low
    return q - error * inverse


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Upper and lower 12 digits of float32; their sum is exact."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & ~0xFFF
    high = lax.bitcast_convert_type(bits, jnp.float32)
    return high, x - high

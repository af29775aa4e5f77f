"""Hopper: quantisation in one pass over memory, by the Triton back end of Pallas.

Kernels write the scales of rows as [T, M], as products read them, and those of columns as [R, K];
callers get the transpose, which XLA cancels with that of the product.

Letters: M rows and K columns (F behind a gated unit) of a matrix, T and R tiles of 128 along them;
J and C rows and columns that a program holds, I every fourth of its rows.
"""

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.quantize.reference import BLOCK, SMALLEST_MAX, divide, gated, scales

Arrays = tuple[jax.Array, ...]
E4M3 = jnp.float8_e4m3fn
MAX_SIZE = 2**31 - 1  # elements of a matrix: offsets of codes are int32


@dataclass(frozen=True)
class Config:
    """What a program holds; powers of two."""

    rows: int  # a multiple of 128 where columns get scales
    columns: int  # a multiple of 128 where only rows get scales, else at most 128
    warps: int


DEFAULTS = {
    "quantize_tiles": Config(rows=64, columns=128, warps=4),
    "quantize_columns": Config(rows=128, columns=64, warps=4),
    "retile": Config(rows=128, columns=64, warps=4),
    "swiglu_quantize_tiles": Config(rows=32, columns=128, warps=4),
}


def quantize_tiles_hopper(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULTS["quantize_tiles"],
    interpret: bool = False,
) -> Arrays:
    """As `quantize_tiles_reference`."""
    scale = partial(scales, power_of_two=power_of_two, smallest_max=smallest_max)
    return _tiles(_plain, x_MK.shape, (x_MK,), scale, config, interpret)


def swiglu_quantize_tiles_hopper(
    h_M2F: jax.Array,
    weight_M1: jax.Array | None = None,
    power_of_two: bool = False,
    config: Config = DEFAULTS["swiglu_quantize_tiles"],
    interpret: bool = False,
) -> Arrays:
    """As `swiglu_quantize_tiles_reference`, but for the last bits of the exponential."""
    M, F = h_M2F.shape[0], h_M2F.shape[1] // 2

    def product(read, rows_J1, columns_1C, h_M2F, *weight_M):
        gate_JC, up_JC = (read(h_M2F, rows_J1, half, columns_1C) for half in (0, 1))
        weight_J1 = read(weight_M[0], rows_J1) if weight_M else None
        silu = jax.nn.silu if interpret else _silu
        product_JC = gated(gate_JC, up_JC, weight_J1, silu)
        return product_JC.astype(h_M2F.dtype).astype(jnp.float32)

    weight_M = () if weight_M1 is None else (weight_M1.reshape(M),)
    operands = (h_M2F.reshape(M, 2, F), *weight_M)
    scale = partial(scales, power_of_two=power_of_two, smallest_max=SMALLEST_MAX)
    return _tiles(product, (M, F), operands, scale, config, interpret)


def quantize_columns_hopper(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULTS["quantize_columns"],
    interpret: bool = False,
) -> Arrays:
    """As `quantize_columns_reference`."""
    scale = partial(scales, power_of_two=power_of_two, smallest_max=smallest_max)
    return _columns(_plain, x_MK.shape, (x_MK,), scale, config, interpret)


def retile_hopper(
    q_MK: jax.Array,
    s_MT: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    config: Config = DEFAULTS["retile"],
    interpret: bool = False,
) -> Arrays:
    """As `retile_reference`."""

    def dequantized(read, rows_I1, columns_1C, q_MK, s_TM):
        t = lax.div(pl.program_id(1) * config.columns, BLOCK)
        return read(q_MK, rows_I1, columns_1C) * read(s_TM, t, rows_I1)

    operands = (q_MK, s_MT.T)
    scale = partial(scales, power_of_two=power_of_two, smallest_max=smallest_max)
    return _columns(dequantized, q_MK.shape, operands, scale, config, interpret)


def quantize_tiles_and_columns_hopper(
    x_MK: jax.Array,
    power_of_two: bool = False,
    smallest_max: float = SMALLEST_MAX,
    interpret: bool = False,
) -> Arrays:
    """As `quantize_tiles_and_columns_reference`; one program that makes both takes longer."""
    both = quantize_tiles_hopper, quantize_columns_hopper
    tiles, columns = (f(x_MK, power_of_two, smallest_max, interpret=interpret) for f in both)
    return *tiles, *columns


def _plain(read, rows_J1, columns_1C, x_MK):
    return read(x_MK, rows_J1, columns_1C)


def _tiles(values, shape, operands, scale, config, interpret):
    """Codes and scales a row and 128 columns.

    Args:
      values: (read, rows_J1, columns_1C, *refs of operands) -> float32 [J, C], what is quantised.
      shape: (M, K), of all the values.
      scale: `scales`, but for the maxima and the division.
    """
    M, K = shape
    ragged = M % config.rows != 0 or K % config.columns != 0
    read, write = partial(_read, ragged=ragged), partial(_write, ragged=ragged)
    encode = partial(_encode, scale=scale, interpret=interpret)

    def kernel(*refs):
        *inputs, q_MK, s_TM = refs
        rows_J = _span(pl.program_id(0), config.rows)
        for t in _blocks(pl.program_id(1), config.columns):
            at = rows_J[:, None], _span(t, BLOCK)[None]
            (q_JC,), s_J = encode([values(read, *at, *inputs)], axis=1)
            write(q_MK, q_JC, *at)
            write(s_TM, s_J, t, rows_J)

    q_MK, s_TM = _launch(
        kernel, shape, operands, [(M, K), (pl.cdiv(K, BLOCK), M)], config, interpret
    )
    return q_MK, s_TM.T


def _columns(values, shape, operands, scale, config, interpret):
    """Codes and scales a column and 128 rows, transposed.

    Args:
      values: as for `_tiles`.
    """
    M, K = shape
    ragged = M % config.rows != 0 or K % config.columns != 0
    read, write = partial(_read, ragged=ragged), partial(_write, ragged=ragged)
    encode = partial(_encode, scale=scale, interpret=interpret)

    def kernel(*refs):
        *inputs, q_KM, s_RK = refs
        columns_C = _span(pl.program_id(1), config.columns)
        for r in _blocks(pl.program_id(0), config.rows):
            # Four neighbours in a column share a thread, so their codes are transposed as one word.
            quarters = [4 * _span(r, BLOCK // 4) + j for j in range(4)]
            x = [values(read, rows_I[:, None], columns_C[None], *inputs) for rows_I in quarters]
            q, s_C = encode(x, axis=0)
            write(q_KM, _interleaved(*q), columns_C[:, None], _span(r, BLOCK)[None])
            write(s_RK, s_C, r, columns_C)

    q_KM, s_RK = _launch(
        kernel, shape, operands, [(K, M), (pl.cdiv(M, BLOCK), K)], config, interpret
    )
    return q_KM, s_RK.T


def _launch(kernel, shape, operands, results, config, interpret):
    """Runs `kernel` on every patch of a matrix; `results` are the shapes of codes and scales."""
    M, K = shape
    if M * K > MAX_SIZE:
        raise NotImplementedError(f"{M} x {K} elements; at most 2**31 - 1")
    results = [
        jax.ShapeDtypeStruct(result, jnp.float32 if i % 2 else E4M3)
        for i, result in enumerate(results)
    ]
    if M * K == 0:
        return [jnp.zeros(result.shape, result.dtype) for result in results]
    return pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(pl.cdiv(M, config.rows), pl.cdiv(K, config.columns)),
        compiler_params=plt.CompilerParams(num_warps=config.warps),
        interpret=interpret,
    )(*operands)


def _span(index, size):
    return index * size + jnp.arange(size, dtype=jnp.int32)


def _blocks(index, size):
    """Numbers of the blocks of 128 in part `index` of `size` rows or columns."""
    return [index * (size // BLOCK) + block for block in range(size // BLOCK)]


def _read(ref, *indices, ragged):
    """float32, zeros outside."""
    mask = _inside(ref, indices) if ragged else None
    x = plt.load(ref.at[indices], mask=mask).astype(jnp.float32)
    return jnp.where(mask, x, 0) if ragged else x


def _write(ref, x, *indices, ragged):
    plt.store(ref.at[indices], x, mask=_inside(ref, indices) if ragged else None)


def _inside(ref, indices):
    return reduce(jnp.logical_and, [i < n for i, n in zip(indices, ref.shape, strict=True)])


def _encode(x, axis, scale, interpret):
    """Codes of float32 arrays that share tiles along `axis`, and the scales."""
    # As integers magnitudes have the same order, with NaN last.
    bits = reduce(jnp.maximum, [lax.bitcast_convert_type(x_, jnp.int32) & 0x7FFFFFFF for x_ in x])
    largest = lax.bitcast_convert_type(jnp.max(bits, axis=axis), jnp.float32)
    quotient = divide if interpret else _quotient
    s = scale(largest, divide=quotient)
    return [quotient(x_, jnp.expand_dims(s, axis)).astype(E4M3) for x_ in x], s


# 1 / y, off by less than the last bit: one Newton step from the hardware's approximation.
_INVERSE = """{
.reg .f32 r, e;
rcp.approx.ftz.f32 r, $1;
neg.f32 e, $1;
fma.rn.f32 e, e, r, 0f3F800000;
fma.rn.f32 $0, e, r, r;
}"""
# x * (1 / y), corrected once. Taking away the error with its sign turned keeps -0.
_QUOTIENT = """{
.reg .f32 q, e;
mul.rn.f32 q, $1, $3;
neg.f32 e, $1;
fma.rn.f32 e, q, $2, e;
neg.f32 e, e;
fma.rn.f32 $0, e, $3, q;
}"""


_SILU = """{
.reg .f32 e;
mul.rn.f32 e, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 e, e;
add.rn.f32 e, e, 0f3F800000;
rcp.approx.ftz.f32 e, e;
mul.rn.f32 $0, $1, e;
}"""


def _silu(x):
    """x / (1 + 2^(-x log2 e)), by the hardware's approximations."""
    return _assembly(_SILU, x)


def _quotient(x, y):
    """x / y rounded once, which no operator of Triton promises; y broadcasts to x."""
    inverse = 1 / y if isinstance(y, float) else _assembly(_INVERSE, y)
    return _assembly(_QUOTIENT, x, y, inverse)


def _assembly(text, x, *others):
    args = [jnp.broadcast_to(jnp.float32(arg), x.shape) for arg in (x, *others)]
    (result,) = plt.elementwise_inline_asm(
        text,
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def _interleaved(q0_IC, q1_IC, q2_IC, q3_IC):
    """[C, 4 * I]: row i of the first, of the second, .., row i + 1 of the first, .."""
    q_IC22 = jnp.stack([jnp.stack([q0_IC, q2_IC], -1), jnp.stack([q1_IC, q3_IC], -1)], -1)
    return q_IC22.transpose(1, 0, 2, 3).reshape(q0_IC.shape[1], -1)

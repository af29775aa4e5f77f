"""FP8 products and their gradients (spec §5.1): what is quantised along which axis.

    Fprop  Y = X W       X 1x128 along I     W 128x128
    Dgrad  dX = dY W^T   dY 1x128 along O    W the same blocks
    Wgrad  dW = X^T dY   X and dY 128x1 along the rows; float32

Letters: M rows (tokens), I and O widths of a weight, N and K rows and columns of any operand, T
and R tiles of 128 along the columns and the rows, S shards of the rows.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.mesh import BATCH_AXES
from dsv3_jax.precision.block_scaled import refuse_gradient
from dsv3_jax.precision.policy import Fp8Recipe
from pallas_kernels import (
    dequantize_tiles,
    fp8_matmul,
    quantize_blocks,
    quantize_columns,
    quantize_tiles,
    quantize_tiles_and_columns,
    retile,
    swiglu_quantize_tiles,
)
from pallas_kernels.fp8_matmul import reference as fp8_matmul_reference
from pallas_kernels.quantize.reference import BLOCK, E4M3_MAX, SMALLEST_GRADIENT_MAX, gated

if TYPE_CHECKING:
    from dsv3_jax.precision.fp8_weight import Fp8Weight

Quantized = tuple[jax.Array, jax.Array]  # codes, scales


def tiles(x_MK: jax.Array, recipe: Fp8Recipe, power_of_two: bool = False) -> Quantized:
    """Activations for a product over K: q_MK, s_MT (1x128)."""
    q_MK, s_MT = quantize_tiles(x_MK, power_of_two, recipe.implementation)
    return _one_scale(x_MK, q_MK, s_MT, recipe)


def gradient_tiles(dy_MN: jax.Array, recipe: Fp8Recipe, power_of_two: bool = False) -> Quantized:
    """Activation gradients for Dgrad, a product over N: q_MN, s_MT.

    With `gradient_scales='blocks'` 128 rows share a scale, which diverges (spec §5.7).
    """
    how = power_of_two, recipe.implementation, SMALLEST_GRADIENT_MAX
    if recipe.gradient_scales == "tiles":
        return _one_scale(dy_MN, *quantize_tiles(dy_MN, *how), recipe)
    q_MN, s_RT = quantize_blocks(dy_MN, *how)
    s_MT = jnp.repeat(s_RT, BLOCK, axis=0)[: len(q_MN)]
    return _one_scale(dy_MN, q_MN, s_MT, recipe)


def columns(x_MK: jax.Array, recipe: Fp8Recipe, power_of_two: bool = False) -> Quantized:
    """Activations for Wgrad, a product over M: q_KM, s_KR (128x1), transposed."""
    q_KM, s_KR = quantize_columns(x_MK, power_of_two, recipe.implementation)
    return _one_scale(x_MK.T, q_KM, s_KR, recipe)


def gradient_columns(dy_MN: jax.Array, recipe: Fp8Recipe) -> Quantized:
    """Activation gradients for Wgrad: q_NM, s_NR (128x1), transposed."""
    how = False, recipe.implementation, SMALLEST_GRADIENT_MAX
    return _one_scale(dy_MN.T, *quantize_columns(dy_MN, *how), recipe)


def gradient_tiles_and_columns(dy_MN: jax.Array, recipe: Fp8Recipe) -> tuple[Quantized, Quantized]:
    """`gradient_tiles` for Dgrad and `gradient_columns` for Wgrad."""
    if recipe.gradient_scales != "tiles":
        return gradient_tiles(dy_MN, recipe), gradient_columns(dy_MN, recipe)
    how = False, recipe.implementation, SMALLEST_GRADIENT_MAX
    q_MN, s_MT, q_NM, s_NR = quantize_tiles_and_columns(dy_MN, *how)
    return _one_scale(dy_MN, q_MN, s_MT, recipe), _one_scale(dy_MN.T, q_NM, s_NR, recipe)


def columns_of_tiles(
    q_MK: jax.Array, s_MT: jax.Array, recipe: Fp8Recipe, power_of_two: bool = False
) -> Quantized:
    """As `columns`, of the codes of `tiles` or of `gradient_tiles` (spec §5.1)."""
    # The codes may be of gradients; for activations the bound makes no difference.
    q_KM, s_KR = retile(q_MK, s_MT, power_of_two, recipe.implementation, SMALLEST_GRADIENT_MAX)
    return _one_scale(dequantize_tiles(q_MK, s_MT, jnp.float32).T, q_KM, s_KR, recipe)


def swiglu_tiles(h_M2F: jax.Array, weight_M1: jax.Array | None, recipe: Fp8Recipe) -> Quantized:
    """As `tiles`, of silu(gate) * up [* weight]: q_MF, s_MT."""
    q_MF, s_MT = swiglu_quantize_tiles(h_M2F, weight_M1, False, recipe.implementation)
    product_MF = gated(*jnp.split(h_M2F.astype(jnp.float32), 2, axis=-1), weight_M1)
    return _one_scale(product_MF.astype(h_M2F.dtype), q_MF, s_MT, recipe)


def blocks(w_NK: jax.Array, recipe: Fp8Recipe) -> Quantized:
    """Weights: q_NK and a scale a 128x128 block."""
    q_NK, s_BT = quantize_blocks(w_NK)
    return _one_scale(w_NK, q_NK, s_BT, recipe)


def _one_scale(x_NK, q_NK, s_RT, recipe):
    """The same quantisation with the largest scale for the whole tensor, if the recipe says so."""
    if recipe.scales == "fine":
        return q_NK, s_RT
    s = jnp.max(s_RT)
    # The barrier keeps XLA from multiplying by a rounded reciprocal instead.
    s_NK = jax.lax.optimization_barrier(jnp.broadcast_to(s, x_NK.shape))
    q_NK = jnp.clip(x_NK.astype(jnp.float32) / s_NK, -E4M3_MAX, E4M3_MAX)
    return q_NK.astype(jnp.float8_e4m3fn), jnp.broadcast_to(s, s_RT.shape)


def product(
    q_MK: jax.Array,
    s_MT: jax.Array,
    q_NK: jax.Array,
    s_BT: jax.Array,
    out_dtype: jnp.dtype,
    recipe: Fp8Recipe,
) -> jax.Array:
    """y_MN in `out_dtype`; see `pallas_kernels.fp8_matmul`. `s_BT` may also be a scale a row."""
    if not recipe.promotion:
        unpromoted = fp8_matmul_reference.fp8_matmul_unpromoted_reference
        return unpromoted(q_MK, s_MT, q_NK, s_BT, out_dtype)
    return fp8_matmul(q_MK, s_MT, q_NK, s_BT, out_dtype, recipe.implementation)


def fp8_linear(
    x: jax.Array,
    weight: "Fp8Weight",
    recipe: Fp8Recipe,
    *,
    power_of_two: bool = False,
    mesh: Mesh | None = None,
    name: str = "linear_in",
) -> jax.Array:
    """`x @ weight` in FP8, and its gradients in FP8.

    Args:
      x: [..., I] of any float dtype.
      weight: [I, O].
      power_of_two: scales of x (spec §5.3).
      mesh: rows of x are split over its batch axes, and every device multiplies its own; None: one
        device, or a call inside `shard_map`.
      name: under which recomputation policies find the codes and scales of x, all that the backward
        pass needs of it.

    Returns:
      [..., O] bfloat16. Gradients: dx in x's dtype; float32 for `weight.master`, none for codes.

    Raises:
      UserError: a gradient is asked for and the weight has no master to receive it.
    """
    how = _How(recipe, power_of_two, mesh, name)
    w = weight
    return on_rows(
        lambda x_MI: _linear(how, x_MI, w.master, w.codes_IO, w.codes_OI, w.scales_IO), x, mesh
    )


class _How(NamedTuple):
    recipe: Fp8Recipe
    power_of_two: bool
    mesh: Mesh | None
    name: str


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(how, x_MI, master, codes_IO, codes_OI, scales_IO):
    return _forward(how, x_MI, codes_OI, scales_IO)[0]


def _forward(how, x_MI, codes_OI, scales_IO):
    """y_MO, and the codes and scales of x."""
    quantize = partial(tiles, recipe=how.recipe, power_of_two=how.power_of_two)
    x_codes = checkpoint_name(on_shards(quantize, how.mesh, "r")(x_MI), how.name)
    multiply = partial(product, out_dtype=jnp.bfloat16, recipe=how.recipe)
    return on_shards(multiply, how.mesh, "rrww")(*x_codes, codes_OI, scales_IO.T), x_codes


def _forward_rule(how, x_MI, master, codes_IO, codes_OI, scales_IO):
    refuse_gradient(master)
    y_MO, x_codes = _forward(how, x_MI, codes_OI, scales_IO)
    # The zero-size array carries x's dtype to the backward pass.
    return y_MO, (x_codes, codes_IO, scales_IO, jnp.zeros((0,), x_MI.dtype))


def _backward_rule(how, residuals, dy_MO):
    x_codes, codes_IO, scales_IO, like_x = residuals

    def gradients(x_codes, dy_MO, codes_IO, scales_IO):
        dy_tiles, dy_columns = gradient_tiles_and_columns(dy_MO, how.recipe)
        dx_MI = product(*dy_tiles, codes_IO, scales_IO, jnp.bfloat16, how.recipe)
        x_columns = columns_of_tiles(*x_codes, how.recipe, how.power_of_two)
        return dx_MI, product(*x_columns, *dy_columns, jnp.float32, how.recipe)[None]

    dx_MI, partial_dw_SIO = on_shards(gradients, how.mesh, "rrww")(
        x_codes, dy_MO, codes_IO, scales_IO
    )
    # Summed out here, so that XLA may reduce and scatter at once.
    dw_IO = jnp.sum(partial_dw_SIO, axis=0)
    return dx_MI.astype(like_x.dtype), dw_IO, None, None, None


_linear.defvjp(_forward_rule, _backward_rule)


def on_rows(function: Callable, x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """A function of rows [M, I] -> [M, O] for [..., I], in rows enough for all devices."""
    x_MI = x.reshape(-1, x.shape[-1])
    num_rows = len(x_MI)
    if mesh is not None:  # a small batch, at inference: rows of zeros
        data, expert = BATCH_AXES
        num_shards = mesh.shape[data] * mesh.shape[expert]
        x_MI = jnp.pad(x_MI, ((0, -num_rows % num_shards), (0, 0)))
    return function(x_MI)[:num_rows].reshape(*x.shape[:-1], -1)


def on_shards(function: Callable, mesh: Mesh | None, operands: str) -> Callable:
    """Every device on its own rows, since XLA cannot partition a kernel.

    Args:
      operands: a letter each: 'r' has rows of tokens (an array, or a pytree of some), 'w' is a
        weight, whole on every device.
    """
    if mesh is None:
        return function
    specs = {"r": P(BATCH_AXES), "w": P()}
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(specs[letter] for letter in operands),
        out_specs=specs["r"],
        check_vma=False,
    )

"""SwiGLU and its down-projection in FP8 (spec §5.5).

The gate and up activations are kept as E4M3 codes; the SwiGLU output is not kept, but computed from
them again. Letters: M rows (tokens), F and O widths of the down-projection, T tiles of 128.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dsv3_jax.precision.block_scaled import refuse_gradient
from dsv3_jax.precision.fp8 import (
    Quantized,
    columns,
    gradient_tiles_and_columns,
    on_rows,
    on_shards,
    product,
    swiglu_tiles,
    tiles,
)
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.policy import Fp8Recipe
from pallas_kernels import dequantize_tiles
from pallas_kernels.quantize.reference import gated


def fp8_swiglu_linear(
    h: jax.Array, weight: Fp8Weight, recipe: Fp8Recipe, *, mesh: Mesh | None = None
) -> jax.Array:
    """`(silu(gate) * up) @ weight` in FP8, and its gradients in FP8.

    All that the backward pass needs of h are its codes and scales, under the name 'w13_out'.

    Args:
      h: [..., 2F] bfloat16, gate columns first.
      weight: [F, O].
      mesh: as in `fp8_linear`.

    Returns:
      [..., O] bfloat16. Gradients: dh bfloat16; float32 for `weight.master`, none for codes.

    Raises:
      UserError: a gradient is asked for and the weight has no master to receive it.
    """
    how = _How(recipe, mesh)
    return on_rows(lambda h_M2F: _swiglu_linear(how, h_M2F, weight), h, mesh)


def swiglu_gradients(
    h_codes: Quantized, weight_M1: jax.Array | None, dproduct_MF: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The SwiGLU output once more, and its derivatives, all from the codes of h, in float32.

    Args:
      h_codes: of h_M2F, in tiles.
      weight_M1: float32, of routed rows; it multiplies the output.
      dproduct_MF: bfloat16, the gradient of the output.

    Returns:
      product_MF and dh_M2F, bfloat16; dweight_M1, float32.
    """
    h_M2F = dequantize_tiles(*h_codes, jnp.float32)

    def swiglu(h_M2F, weight_M1):
        return gated(*jnp.split(h_M2F, 2, axis=-1), weight_M1)

    product_MF, backward = jax.vjp(swiglu, h_M2F, weight_M1)
    dh_M2F, dweight_M1 = backward(dproduct_MF.astype(jnp.float32))
    return product_MF.astype(jnp.bfloat16), dh_M2F.astype(jnp.bfloat16), dweight_M1


class _How(NamedTuple):
    recipe: Fp8Recipe
    mesh: Mesh | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu_linear(how, h_M2F, weight):
    def multiply(h_M2F, codes_OF, scales_FO):
        q_MF, s_MT = swiglu_tiles(h_M2F, None, how.recipe)
        return product(q_MF, s_MT, codes_OF, scales_FO.T, jnp.bfloat16, how.recipe)

    return on_shards(multiply, how.mesh, "rww")(h_M2F, weight.codes_OI, weight.scales_IO)


def _forward_rule(how, h_M2F, weight):
    refuse_gradient(weight.master)
    quantize = on_shards(partial(tiles, recipe=how.recipe), how.mesh, "r")
    h_codes = checkpoint_name(quantize(h_M2F), "w13_out")
    return _swiglu_linear(how, h_M2F, weight), (h_codes, weight.codes_IO, weight.scales_IO)


def _backward_rule(how, residuals, dy_MO):
    recipe = how.recipe

    def gradients(h_codes, dy_MO, codes_FO, scales_FO):
        dy_tiles, dy_columns = gradient_tiles_and_columns(dy_MO, recipe)
        dproduct_MF = product(*dy_tiles, codes_FO, scales_FO, jnp.bfloat16, recipe)
        product_MF, dh_M2F, _ = swiglu_gradients(h_codes, None, dproduct_MF)
        product_columns = columns(product_MF, recipe)
        return dh_M2F, product(*product_columns, *dy_columns, jnp.float32, recipe)[None]

    h_codes, codes_FO, scales_FO = residuals
    dh_M2F, partial_dw_SFO = on_shards(gradients, how.mesh, "rrww")(
        h_codes, dy_MO, codes_FO, scales_FO
    )
    return dh_M2F, Fp8Weight(jnp.sum(partial_dw_SFO, axis=0), None, None, None)


_swiglu_linear.defvjp(_forward_rule, _backward_rule)

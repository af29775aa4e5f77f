"""Routed experts in FP8, with the dispatch and the combine around them (spec §5.1, §5.5, §5.6).

    forward   x -1x128-> pack, send -> w13 -> h -> SwiGLU -1x128-> w2 -> combine -> y
    backward  dy -1x128-> pack, send -> w2 -> SwiGLU' -> dh -1x128-> w13 -> combine -> dx

Tokens and their gradients travel as codes and scales, quantised by the token's owner with scales
that are powers of two (spec §5.3), in both directions what returns is BF16. The backward pass needs
the codes that the experts received, the codes of h, and the routing; the forward pass is cut at h,
since integers have no derivative: `_up` is what comes before it and `_down` what comes after.

Letters: X own tokens, R received rows, M slots, K choices, E experts here, D and F widths.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.parallel.expert_parallel import Hop, combine, room_for_pairs, route, send
from dsv3_jax.parallel.permute import Routes, align, collect, sort_pairs, spread
from dsv3_jax.precision.block_scaled import refuse_gradient
from dsv3_jax.precision.fp8 import (
    Quantized,
    columns,
    columns_of_tiles,
    gradient_tiles,
    gradient_tiles_and_columns,
    swiglu_tiles,
    tiles,
)
from dsv3_jax.precision.fp8_ffn import swiglu_gradients
from dsv3_jax.precision.fp8_grouped import grouped_product, grouped_weight_gradient
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.policy import LINEARS, Fp8Recipe
from pallas_kernels import pack_rows
from pallas_kernels.moe_permute import permute_packed_rows
from pallas_kernels.quantize.reference import BLOCK

_TOKENS_POWER_OF_TWO = LINEARS["expert_w13"].power_of_two_input
_GRADIENTS_POWER_OF_TWO = LINEARS["expert_w2"].power_of_two_gradient


def fp8_experts(
    x_XD: jax.Array,
    ids_XK: jax.Array,
    weights_XK: jax.Array,
    w13: Fp8Weight,
    w2: Fp8Weight,
    *,
    recipe: Fp8Recipe,
    num_experts: int,
    hops: Sequence[Hop],
) -> tuple[jax.Array, jax.Array]:
    """sum_k weight_k FFN_k(x) on one device: dispatch, its own experts, combine (spec §3, step 6).

    Call inside `shard_map`, unless there are no hops.

    Args:
      x_XD: of any float dtype.
      ids_XK: int32 experts, different within a row; `num_experts`: none.
      weights_XK: float32; they multiply the SwiGLU output, so that later sums are plain.
      w13, w2: [E, D, 2F] and [E, F, D], of this device's experts.
      num_experts: of the whole `expert` axis.

    Returns:
      y_XD bfloat16, and the int32 number of rows and pairs that found no room. Gradients: dx in
      x's dtype; float32 for `weights_XK` and the masters.

    Raises:
      UserError: a gradient is asked for and the weights have no masters to receive it.
    """
    choices = route(ids_XK, weights_XK, num_experts=num_experts, hops=hops)
    # No tile of 128 rows, over which Wgrad's operands share a scale, belongs to two experts.
    slots = sort_pairs(choices.ids_RK, w13.shape[0], room_for_pairs(hops))
    routes = align(*slots, BLOCK)
    rows, pairs, sizes_E = checkpoint_name(routes, "routing")
    weight_M1 = spread(choices.weights_RK.reshape(-1, 1), pairs)
    how, routing = _How(recipe, tuple(hops)), _Routing(choices.plans, rows, sizes_E)
    h_M2F = _up(how, x_XD, w13, routing)
    return _down(how, h_M2F, weight_M1, w2, routing), choices.overflow


class _How(NamedTuple):
    recipe: Fp8Recipe
    hops: tuple[Hop, ...]


class _Routing(NamedTuple):
    """Where rows go."""

    plans: tuple  # of the hops
    rows: Routes  # received rows to slots
    sizes_E: jax.Array  # slots of each expert, multiples of 128


def _received(how: _How, codes: Quantized, routing: _Routing) -> jax.Array:
    """Codes and scales of the rows that came to this device, payload_RW."""
    return send(pack_rows(*codes), routing.plans, hops=how.hops)


def _in_slots(payload_RW: jax.Array, width: int, routing: _Routing) -> Quantized:
    """Codes and scales of the received rows in the slots of experts; zeros in empty slots."""
    return permute_packed_rows(payload_RW, routing.rows.row_M, width)


def _from_experts(how: _How, y_MD: jax.Array, routing: _Routing) -> jax.Array:
    return combine(collect(y_MD, routing.rows), routing.plans, hops=how.hops)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _up(how, x_XD, w13, routing):
    return _up_forward(how, x_XD, w13, routing)[0]


def _up_forward(how, x_XD, w13, routing):
    """h_M2F bfloat16, and the rows received: kept so, once, and not in the slots of K experts."""
    payload_RW = _received(how, tiles(x_XD, how.recipe, _TOKENS_POWER_OF_TWO), routing)
    payload_RW = checkpoint_name(payload_RW, "expert_in")
    x_codes = _in_slots(payload_RW, w13.shape[1], routing)
    weight = w13.codes_OI, jnp.swapaxes(w13.scales_IO, -1, -2)
    return grouped_product(*x_codes, *weight, routing.sizes_E, how.recipe), payload_RW


def _up_forward_rule(how, x_XD, w13, routing):
    refuse_gradient(w13.master)
    h_M2F, payload_RW = _up_forward(how, x_XD, w13, routing)
    # The zero-size array carries x's dtype to the backward pass.
    like_x = jnp.zeros((0,), x_XD.dtype)
    return h_M2F, (payload_RW, w13.codes_IO, w13.scales_IO, routing, like_x)


def _up_backward_rule(how, residuals, dh_M2F):
    payload_RW, codes_IO, scales_IO, routing, like_x = residuals
    recipe, sizes_E = how.recipe, routing.sizes_E
    x_codes = _in_slots(payload_RW, codes_IO.shape[1], routing)
    dh_tiles, dh_columns = gradient_tiles_and_columns(dh_M2F, recipe)
    dx_MD = grouped_product(*dh_tiles, codes_IO, scales_IO, sizes_E, recipe)
    x_columns = columns_of_tiles(*x_codes, recipe, _TOKENS_POWER_OF_TWO)
    dw13 = grouped_weight_gradient(*x_columns, *dh_columns, sizes_E, recipe)
    dx_XD = _from_experts(how, dx_MD, routing)
    return dx_XD.astype(like_x.dtype), Fp8Weight(dw13, None, None, None), None


_up.defvjp(_up_forward_rule, _up_backward_rule)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _down(how, h_M2F, weight_M1, w2, routing):
    product_codes = swiglu_tiles(h_M2F, weight_M1, how.recipe)
    weight = w2.codes_OI, jnp.swapaxes(w2.scales_IO, -1, -2)
    y_MD = grouped_product(*product_codes, *weight, routing.sizes_E, how.recipe)
    return _from_experts(how, y_MD, routing)


def _down_forward_rule(how, h_M2F, weight_M1, w2, routing):
    refuse_gradient(w2.master)
    h_codes = checkpoint_name(tiles(h_M2F, how.recipe), "w13_out")
    y_XD = _down(how, h_M2F, weight_M1, w2, routing)
    return y_XD, (h_codes, weight_M1, w2.codes_IO, w2.scales_IO, routing)


def _down_backward_rule(how, residuals, dy_XD):
    h_codes, weight_M1, codes_IO, scales_IO, routing = residuals
    recipe, sizes_E = how.recipe, routing.sizes_E
    dy_codes = gradient_tiles(dy_XD, recipe, _GRADIENTS_POWER_OF_TWO)
    dy_codes = _in_slots(_received(how, dy_codes, routing), dy_XD.shape[1], routing)
    dproduct_MF = grouped_product(*dy_codes, codes_IO, scales_IO, sizes_E, recipe)
    product_MF, dh_M2F, dweight_M1 = swiglu_gradients(h_codes, weight_M1, dproduct_MF)
    product_columns = columns(product_MF, recipe)
    dy_columns = columns_of_tiles(*dy_codes, recipe, _GRADIENTS_POWER_OF_TWO)
    dw2 = grouped_weight_gradient(*product_columns, *dy_columns, sizes_E, recipe)
    return dh_M2F, dweight_M1, Fp8Weight(dw2, None, None, None), None


_down.defvjp(_down_forward_rule, _down_backward_rule)

"""Attention and the Linear after it in FP8, with one copy of what lies between (spec §5.5).

Attention's backward pass and the weight gradient of o_proj both need attention's output. It is kept
for them in E5M6, 12 bits a value; the forward product takes a cast to E4M3 of its own. Letters:
`shapes.md`; I = N H, the width of the output, and M tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dsv3_jax.model.attention import Attention, choose
from dsv3_jax.precision.block_scaled import refuse_gradient
from dsv3_jax.precision.formats import pack_e5m6, unpack_e5m6
from dsv3_jax.precision.fp8 import (
    columns,
    fp8_linear,
    gradient_tiles_and_columns,
    on_shards,
    product,
)
from dsv3_jax.precision.fp8_weight import Fp8Weight
from dsv3_jax.precision.policy import LINEARS, Fp8Recipe

_POWER_OF_TWO = LINEARS["wo"].power_of_two_input


def attend_and_project(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BSNP: jax.Array,
    k_rope_BSR: jax.Array,
    v_BSNH: jax.Array,
    weight: Fp8Weight,
    recipe: Fp8Recipe,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    implementation: str | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """`fp8_linear` of `mla_attention`, both with the arguments and errors of their own.

    Args:
      weight: [I, D].

    Returns:
      [B, T, D] bfloat16. Gradients: of the inputs in their dtypes; float32 for `weight.master`.
    """
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH)
    how = _How(choose(inputs, segments_BT, implementation, mesh), scale, recipe, mesh)
    return _attend_and_project(how, inputs, segments_BT, weight)


class _How(NamedTuple):
    attention: Attention
    scale: float
    recipe: Fp8Recipe
    mesh: Mesh | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_and_project(how, inputs, segments_BT, weight):
    return _forward(how, inputs, segments_BT, weight)[0]


def _forward(how, inputs, segments_BT, weight):
    o_BTNH, lse = how.attention.forward(*inputs, segments_BT, how.scale)
    o_BTI = o_BTNH.reshape(*o_BTNH.shape[:2], -1)
    y_BTD = fp8_linear(
        o_BTI, weight, how.recipe, power_of_two=_POWER_OF_TWO, mesh=how.mesh, name="wo_in"
    )
    return y_BTD, o_BTI, lse


def _forward_rule(how, inputs, segments_BT, weight):
    refuse_gradient(weight.master)
    y_BTD, o_BTI, lse = _forward(how, inputs, segments_BT, weight)
    # Named so that recomputation policies keep both and skip attention's forward pass (block.py).
    packed = checkpoint_name(pack_e5m6(o_BTI), "attention_out")
    lse = checkpoint_name(lse, "attention_lse")
    return y_BTD, (inputs, segments_BT, packed, lse, weight.codes_IO, weight.scales_IO)


def _backward_rule(how, residuals, dy_BTD):
    inputs, segments_BT, packed, lse, codes_IO, scales_IO = residuals
    recipe, v_BSNH = how.recipe, inputs[-1]
    o_BTI = unpack_e5m6(*packed, len(codes_IO), v_BSNH.dtype)
    dy_MD = dy_BTD.reshape(-1, dy_BTD.shape[-1])

    def gradients(o_MI, dy_MD, codes_IO, scales_IO):
        dy_tiles, dy_columns = gradient_tiles_and_columns(dy_MD, recipe)
        do_MI = product(*dy_tiles, codes_IO, scales_IO, jnp.bfloat16, recipe)
        o_columns = columns(o_MI, recipe, _POWER_OF_TWO)
        return do_MI, product(*o_columns, *dy_columns, jnp.float32, recipe)[None]

    o_MI = o_BTI.reshape(-1, o_BTI.shape[-1])
    do_MI, partial_dw_SID = on_shards(gradients, how.mesh, "rrww")(o_MI, dy_MD, codes_IO, scales_IO)
    heads = (*o_BTI.shape[:2], *v_BSNH.shape[2:])
    o_BTNH, do_BTNH = o_BTI.reshape(heads), do_MI.reshape(heads).astype(v_BSNH.dtype)
    d_inputs = how.attention.backward(inputs, segments_BT, how.scale, o_BTNH, lse, do_BTNH)
    # Summed out here, so that XLA may reduce and scatter at once.
    dw_ID = jnp.sum(partial_dw_SID, axis=0)
    return d_inputs, None, Fp8Weight(dw_ID, None, None, None)


_attend_and_project.defvjp(_forward_rule, _backward_rule)

"""The definition: causal attention with nope and rope parts, whole score matrices, float32.

Letters, here and in the kernels: B batch, T tokens, N heads, P nope, R rope, H value head; Q query
rows and K key rows of a block.
"""

import jax
import jax.numpy as jnp
from jax import lax


def mla_attention_reference(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """softmax over starts <= j <= t of scale * (q_nope.k_nope + q_rope.k_rope), times v (spec §2).

    Args:
      starts_BT: int32, the first token of every token's document; None: one document.

    Returns:
      o_BTNH in v's dtype, and the log of the softmax's sum, [B, N, T] float32.
    """
    wide = [x.astype(jnp.float32) for x in (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR)]
    q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR = wide
    scores_BNTS = jnp.einsum("BTNP,BSNP->BNTS", q_nope_BTNP, k_nope_BTNP, precision="highest")
    scores_BNTS += jnp.einsum("BTNR,BSR->BNTS", q_rope_BTNR, k_rope_BTR, precision="highest")
    query, key = (lax.broadcasted_iota(jnp.int32, scores_BNTS.shape, dim) for dim in (2, 3))
    visible = key <= query
    if starts_BT is not None:
        visible &= key >= starts_BT[:, None, :, None]
    scores_BNTS = jnp.where(visible, scores_BNTS * scale, -jnp.inf)
    lse_BNT = jax.nn.logsumexp(scores_BNTS, axis=-1)
    weights_BNTS = jnp.exp(scores_BNTS - lse_BNT[..., None])
    v32 = v_BTNH.astype(jnp.float32)
    o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v32, precision="highest")
    return o_BTNH.astype(v_BTNH.dtype), lse_BNT


def mla_gradients_reference(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BTNP: jax.Array,
    k_rope_BTR: jax.Array,
    v_BTNH: jax.Array,
    starts_BT: jax.Array | None,
    scale: float,
    o_BTNH: jax.Array,
    lse_BNT: jax.Array,
    do_BTNH: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients of the five inputs, in their dtypes, for the gradient `do` of the output."""
    del o_BTNH, lse_BNT  # of the forward pass: this one runs it again

    def attend(*inputs):
        return mla_attention_reference(*inputs, starts_BT, scale)[0]

    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BTNP, k_rope_BTR, v_BTNH)
    return jax.vjp(attend, *inputs)[1](do_BTNH.astype(v_BTNH.dtype))


def document_starts(segments_BT: jax.Array) -> jax.Array:
    """Index of the first token of every token's document: int32 [B, T].

    Args:
      segments_BT: document numbers; a document's tokens lie side by side.
    """
    index_BT = lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
    changes_BT = segments_BT != jnp.roll(segments_BT, 1, axis=1)
    return lax.cummax(jnp.where(changes_BT, index_BT, 0), axis=1)

"""Causal attention of MLA behind one function: exact, and never a T x T array.

The rope key is shared by all heads and stays unbroadcast in the interface. An implementation that
does not take its inputs raises NotImplementedError; the dispatcher goes on to the next one.
Shape letters: B batch, T query tokens, S key tokens, N heads, P nope, R rope, H value head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.errors import UserError, did_you_mean

BLOCK_TOKENS = 512  # most query or key tokens of a block of scores


def mla_attention(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    k_nope_BSNP: jax.Array,
    k_rope_BSR: jax.Array,
    v_BSNH: jax.Array,
    *,
    scale: float,
    segments_BT: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax over j <= t of scale * (q_nope.k_nope + q_rope.k_rope), times v (spec §2).

    Products take their operands in the input dtype and accumulate in float32; softmax is float32.

    Args:
      scale: multiplies the whole logit.
      segments_BT: int32 document numbers; a token attends to its own document only. S must be T.
      implementation: 'cudnn' or 'blockwise'; None takes the first that accepts the inputs.

    Returns:
      [B, T, N, H] in v's dtype.

    Raises:
      UserError: unknown implementation.
      NotImplementedError: no implementation accepts the inputs; lists every reason.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        hint = did_you_mean(implementation, IMPLEMENTATIONS)
        raise UserError(
            f"attention {implementation!r} is unknown;{hint} allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    reasons = []
    for name in (implementation,) if implementation else IMPLEMENTATIONS:
        try:
            return IMPLEMENTATIONS[name](
                q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale
            )
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention accepts these inputs; " + "; ".join(reasons))


def cudnn_attention(q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT, scale):
    """cuDNN's fused attention: one head dim for queries, keys and (zero-padded) values."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError("needs an NVIDIA GPU")
    if segments_BT is not None:
        raise NotImplementedError("takes no separate documents")
    if v_BSNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 or float16, not {v_BSNH.dtype}")
    width, v_width = q_nope_BTNP.shape[-1] + q_rope_BTNR.shape[-1], v_BSNH.shape[-1]
    if width > 256 or width % 8 or v_width > width:
        raise NotImplementedError(f"takes no head widths {width} (q, k) and {v_width} (v)")
    num_heads = k_nope_BSNP.shape[2]
    k_rope_BSNR = jnp.broadcast_to(
        k_rope_BSR[:, :, None], (*k_rope_BSR.shape[:2], num_heads, k_rope_BSR.shape[-1])
    )
    o = jax.nn.dot_product_attention(
        jnp.concatenate([q_nope_BTNP, q_rope_BTNR], axis=-1),
        jnp.concatenate([k_nope_BSNP, k_rope_BSNR], axis=-1),
        jnp.pad(v_BSNH, ((0, 0), (0, 0), (0, 0), (0, width - v_width))),
        scale=scale,
        is_causal=True,
        implementation="cudnn",
    )
    return o[..., :v_width]


def blockwise_attention(
    q_nope_BTNP,
    q_rope_BTNR,
    k_nope_BSNP,
    k_rope_BSR,
    v_BSNH,
    segments_BT,
    scale,
    block_tokens=BLOCK_TOKENS,
):
    """Online softmax over blocks of keys, on every platform.

    Blocks that lie wholly in the future are not visited. The VJP is explicit (residuals: inputs,
    output and log-sum-exp) and blockwise too.
    """
    num_tokens = q_nope_BTNP.shape[1]
    if k_nope_BSNP.shape[1] != num_tokens:
        raise NotImplementedError("takes as many keys as queries")
    num_blocks = -(-num_tokens // block_tokens)
    block = -(-num_tokens // num_blocks)
    # Padding keys come after every real query and padding queries are dropped, so the causal mask
    # alone hides both.
    padding = num_blocks * block - num_tokens
    arrays = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH, segments_BT)
    arrays = jax.tree.map(lambda a: jnp.pad(a, _pad_tokens(a.ndim, padding)), arrays)
    return _blockwise(*arrays, scale, block)[:, :num_tokens]


def _pad_tokens(ndim: int, padding: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, padding)] + [(0, 0)] * (ndim - 2)


def _to_blocks(x, block):
    """[B, T, ...] -> [T / block, B, block, ...]."""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _from_blocks(x):
    """[blocks, B, block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _dot32(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def _scores(q, k, i, j, scale):
    """Masked float32 scores [B, N, T, S] of query block i on key block j (nope, rope, segments)."""
    (q_nope, q_rope, q_segments), (k_nope, k_rope, k_segments) = q, k
    scores = _dot32("BTNP,BSNP->BNTS", q_nope, k_nope) + _dot32("BTNR,BSR->BNTS", q_rope, k_rope)
    block = q_nope.shape[1]
    row, column = jnp.arange(block)[:, None], jnp.arange(block)
    visible = (i * block + row >= j * block + column)[None, None]
    if q_segments is not None:
        visible &= (q_segments[:, :, None] == k_segments[:, None, :])[:, None]
    return jnp.where(visible, scores * scale, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blockwise(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block):
    return _forward(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block)[0]


def _forward(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block):
    q_blocks, k_blocks, v_blocks = jax.tree.map(
        partial(_to_blocks, block=block),
        ((q_nope, q_rope, segments), (k_nope, k_rope, segments), v),
    )

    def query_block(_, inputs):
        i, q = inputs

        def key_block(step, carry):
            o_BNTH, total_BNT, maximum_BNT = carry
            j = i - step  # own block first: from then on every query has seen at least itself
            k, v_j = jax.tree.map(lambda a: a[j], (k_blocks, v_blocks))
            scores = _scores(q, k, i, j, scale)
            new_maximum = jnp.maximum(maximum_BNT, scores.max(-1))
            p = jnp.exp(scores - new_maximum[..., None])
            rescale = jnp.exp(maximum_BNT - new_maximum)
            o_BNTH = o_BNTH * rescale[..., None] + _dot32(
                "BNTS,BSNH->BNTH", p.astype(v_j.dtype), v_j
            )
            return o_BNTH, total_BNT * rescale + p.sum(-1), new_maximum

        batch, _, heads, _ = q_nope.shape
        rows = (batch, heads, block)
        initial = (
            jnp.zeros((*rows, v.shape[-1]), jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.full(rows, -jnp.inf, jnp.float32),
        )
        o_BNTH, total_BNT, maximum_BNT = jax.lax.fori_loop(0, i + 1, key_block, initial)
        o_BTNH = jnp.swapaxes(o_BNTH / total_BNT[..., None], 1, 2).astype(v.dtype)
        return None, (o_BTNH, jnp.swapaxes(maximum_BNT + jnp.log(total_BNT), 1, 2))

    num_blocks = q_blocks[0].shape[0]
    _, (o, lse) = jax.lax.scan(query_block, None, (jnp.arange(num_blocks), q_blocks))
    # Named here so that recomputation policies can keep both and skip this pass (block.py).
    o_BTNH = checkpoint_name(_from_blocks(o), "attention_out")
    lse_BTN = checkpoint_name(_from_blocks(lse), "attention_lse")
    return o_BTNH, (q_nope, q_rope, k_nope, k_rope, v, segments, o_BTNH, lse_BTN)


def _backward(scale, block, residuals, do_BTNH):
    q_nope, q_rope, k_nope, k_rope, v, segments, o_BTNH, lse_BTN = residuals
    delta_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1)
    per_query = ((q_nope, q_rope, segments), do_BTNH.astype(v.dtype), lse_BTN, delta_BTN)
    per_key = ((k_nope, k_rope, segments), v)
    q_side, k_side = jax.tree.map(partial(_to_blocks, block=block), (per_query, per_key))
    num_blocks = q_side[0][0].shape[0]

    def key_block(dq, inputs):
        j, (k, v_j) = inputs

        def query_block(i, carry):
            dq_nope, dq_rope, dk_nope, dk_rope, dv = carry
            q, do, lse, delta = jax.tree.map(lambda a: a[i], q_side)
            lse_BNT, delta_BNT = jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)
            p = jnp.exp(_scores(q, k, i, j, scale) - lse_BNT[..., None])
            dp = _dot32("BTNH,BSNH->BNTS", do, v_j)
            ds = (p * (dp - delta_BNT[..., None]) * scale).astype(v.dtype)
            dv += _dot32("BNTS,BTNH->BSNH", p.astype(v.dtype), do)
            dk_nope += _dot32("BNTS,BTNP->BSNP", ds, q[0])
            dk_rope += _dot32("BNTS,BTNR->BSR", ds, q[1])
            dq_nope = dq_nope.at[i].add(_dot32("BNTS,BSNP->BTNP", ds, k[0]))
            # Heads first, then swapped: XLA's CPU backend lacks the direct bfloat16 contraction.
            dq_rope_BTNR = jnp.swapaxes(_dot32("BNTS,BSR->BNTR", ds, k[1]), 1, 2)
            dq_rope = dq_rope.at[i].add(dq_rope_BTNR)
            return dq_nope, dq_rope, dk_nope, dk_rope, dv

        zeros = [jnp.zeros(a.shape, jnp.float32) for a in (k[0], k[1], v_j)]
        dq_nope, dq_rope, *d_key = jax.lax.fori_loop(j, num_blocks, query_block, (*dq, *zeros))
        return (dq_nope, dq_rope), d_key

    dq = [jnp.zeros(a.shape, jnp.float32) for a in q_side[0][:2]]
    dq, d_key = jax.lax.scan(key_block, tuple(dq), (jnp.arange(num_blocks), k_side))
    gradients = [_from_blocks(g) for g in (*dq, *d_key)]
    primals = (q_nope, q_rope, k_nope, k_rope, v)
    return *(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True)), None


_blockwise.defvjp(_forward, _backward)

# In the order of preference.
IMPLEMENTATIONS = {"cudnn": cudnn_attention, "blockwise": blockwise_attention}

"""Attention of sequences split over `context` (spec §2, §9): only latents travel.

MLA forms the keys and values of all heads from L + R numbers a token, 576 of V3 where they are
40,960. Every device gathers those of the whole sequence and goes through it block by block: it
forms a block's keys and values, lets its own queries see them, and forgets them. So nothing is held
that is T x T, nor keys or values of more than a block. It costs the up-projection of all visible
keys on every device, 2 L N (P + H) FLOP a key; the absorbed form would not need it but makes every
score 3.4 times as dear, which is more from 171 queries a device on.

The passes over blocks are those of `attention.py`, with the loop over keys outside. Shape letters:
B batch, T query tokens, S key tokens, N heads, P nope, R rope, H value head, L KV latent, C
positions of `context`; I = N (P + H), J = L + R.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.model.attention import (
    BLOCK_TOKENS,
    block_gradients,
    block_scores,
    from_blocks,
    softmax_end,
    softmax_start,
    softmax_step,
    to_blocks,
)
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.parallel.context import mirrored, num_context_shards, token_spec
from dsv3_jax.parallel.mesh import CONTEXT_AXIS
from dsv3_jax.precision.policy import dot


def context_attention(
    q_nope_BTNP: jax.Array,
    q_rope_BTNR: jax.Array,
    latents: LatentCache,
    wkv_b_LI: jax.Array,
    *,
    scale: float,
    mesh: Mesh,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`mla_attention` of keys and values `latents @ wkv_b`, all tokens in balanced order.

    Args:
      latents: of the same T tokens.
      wkv_b_LI: float32 master; a head's columns are its P of k_nope, then its H of v.
      scale: multiplies the whole logit.
      mesh: has the axis `context`, and T is a multiple of 2C (`context.num_context_shards`).
      segments_BT: int32 document numbers; a token attends to its own document only.

    Returns:
      [B, T, N, H] in q's dtype, split as the queries are. The weight's gradient is float32.
    """
    num_tokens = q_nope_BTNP.shape[1]
    num_shards, tokens = num_context_shards(mesh, num_tokens), token_spec(mesh, num_tokens)
    chunk = num_tokens // (2 * num_shards)
    how = _How(scale, num_shards, next(b for b in range(BLOCK_TOKENS, 0, -1) if chunk % b == 0))

    def gathered(x):
        return mirrored(jax.lax.all_gather(x, CONTEXT_AXIS, axis=1, tiled=True), num_shards)

    def on_shard(q_nope, q_rope, keys, segments, weight):
        # Gathered again for the backward pass unless a recomputation policy keeps the name. None
        # does: kept by every layer, the latents of whole sequences would be the largest of all.
        keys_BSJ = checkpoint_name(gathered(keys), "context_latents")
        all_segments = None if segments is None else gathered(segments)
        position = jax.lax.axis_index(CONTEXT_AXIS)
        return _attend(how, q_nope, q_rope, keys_BSJ, weight, segments, all_segments, position)

    return jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, tokens, PartitionSpec()),
        out_specs=tokens,
        check_vma=False,
    )(q_nope_BTNP, q_rope_BTNR, jnp.concatenate(latents, axis=-1), segments_BT, wkv_b_LI)


class _How(NamedTuple):
    scale: float
    num_shards: int  # C
    block: int  # tokens of a block; it divides a chunk


class _Blocks(NamedTuple):
    """Which blocks of queries, counted in the whole sequence, a device has: two runs of `count`."""

    first: jax.Array  # of the chunk 2d
    second: jax.Array  # of the chunk 2C-1-2d
    count: int

    def of_query(self, i: jax.Array) -> jax.Array:
        """The number in the sequence of the device's own block i."""
        return jnp.where(i < self.count, self.first + i, self.second + i - self.count)

    def seeing(self, j: jax.Array):
        """How many own blocks see key block j, and a function that gives each: 0, 1, .. -> i."""
        skipped_first = jnp.clip(j - self.first, 0, self.count)
        skipped_second = jnp.clip(j - self.second, 0, self.count)
        in_first = self.count - skipped_first

        def own_block(step):
            in_second = self.count + skipped_second + step - in_first
            return jnp.where(step < in_first, skipped_first + step, in_second)

        return in_first + self.count - skipped_second, own_block

    def num_keys(self) -> jax.Array:
        """Key blocks up to the last that any query sees."""
        return jnp.maximum(self.first, self.second) + self.count


def _own_blocks(how: _How, num_queries: int, position: jax.Array) -> _Blocks:
    count = num_queries // (2 * how.block)
    return _Blocks(2 * position * count, (2 * how.num_shards - 1 - 2 * position) * count, count)


def _keys_and_values(q_nope, q_rope, keys_BSJ, weight_LI):
    """k_nope [B, S, N, P], k_rope [B, S, R] and v [B, S, N, H] of a block of latents."""
    heads, nope_width = q_nope.shape[2:]
    latent_BSL, k_rope_BSR = jnp.split(keys_BSJ, [weight_LI.shape[0]], axis=-1)
    kv = dot(latent_BSL, weight_LI, keys_BSJ.dtype).reshape(*keys_BSJ.shape[:2], heads, -1)
    k_nope_BSNP, v_BSNH = jnp.split(kv, [nope_width], axis=-1)
    return k_nope_BSNP, k_rope_BSR, v_BSNH


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how, q_nope, q_rope, keys_BSJ, weight_LI, segments_BT, segments_BS, position):
    """What one device does. Its T queries are two chunks; S keys are in natural order."""
    return _forward(how, q_nope, q_rope, keys_BSJ, weight_LI, segments_BT, segments_BS, position)[0]


def _forward_rule(how, *inputs):
    o_BTNH, lse_BTN = _forward(how, *inputs)
    # The names under which recomputation policies keep them (block.py).
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return o_BTNH, (*inputs, o_BTNH, lse_BTN)


def _at(x, index):
    return jax.tree.map(lambda a: a[index], x)


def _block_of(x_BS, j, block):
    """Block j of [B, S, ...]; None stays None."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, j * block, block, axis=1), x_BS)


def _forward(how, q_nope, q_rope, keys_BSJ, weight_LI, segments_BT, segments_BS, position):
    batch, num_queries, heads, nope_width = q_nope.shape
    own = _own_blocks(how, num_queries, position)
    q_blocks = jax.tree.map(partial(to_blocks, block=how.block), (q_nope, q_rope, segments_BT))
    last = own.num_keys() - 1

    def key_block(step, carry):
        j = last - step  # from the end, so that a query block meets its own keys first
        keys = _block_of(keys_BSJ, j, how.block)
        *k, v = _keys_and_values(q_nope, q_rope, keys, weight_LI)
        k = (*k, _block_of(segments_BS, j, how.block))
        count, own_block = own.seeing(j)

        def query_block(step, carry):
            i = own_block(step)
            scores = block_scores(_at(q_blocks, i), k, own.of_query(i), j, how.scale)
            new = softmax_step(_at(carry, i), scores, v)
            return jax.tree.map(lambda all_blocks, x: all_blocks.at[i].set(x), carry, new)

        return jax.lax.fori_loop(0, count, query_block, carry)

    value_width = weight_LI.shape[1] // heads - nope_width
    start = softmax_start(batch, heads, how.block, value_width)
    start = jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * own.count, *x.shape)), start)
    carry = jax.lax.fori_loop(0, last + 1, key_block, start)
    return jax.tree.map(from_blocks, softmax_end(carry, q_nope.dtype))


def _backward(how, residuals, do_BTNH):
    *inputs, position, o_BTNH, lse_BTN = residuals
    q_nope, q_rope, keys_BSJ, weight_LI, segments_BT, segments_BS = inputs
    own = _own_blocks(how, q_nope.shape[1], position)
    delta_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1)
    q_side = ((q_nope, q_rope, segments_BT), do_BTNH.astype(q_nope.dtype), lse_BTN, delta_BTN)
    q_side = jax.tree.map(partial(to_blocks, block=how.block), q_side)

    def key_block(j, carry):
        dq, d_keys_BSJ, d_weight_LI = carry
        keys = _block_of(keys_BSJ, j, how.block)
        (k_nope, k_rope, v), pull = jax.vjp(
            partial(_keys_and_values, q_nope, q_rope), keys, weight_LI
        )
        k = (k_nope, k_rope, _block_of(segments_BS, j, how.block))
        count, own_block = own.seeing(j)

        def query_block(step, carry):
            dq, d_key = carry
            i = own_block(step)
            added = block_gradients(_at(q_side, i), k, v, own.of_query(i), j, how.scale)
            dq = [a.at[i].add(x) for a, x in zip(dq, added[:2], strict=True)]
            return dq, [a + x for a, x in zip(d_key, added[2:], strict=True)]

        zeros = [jnp.zeros(a.shape, jnp.float32) for a in (k_nope, k_rope, v)]
        dq, d_key = jax.lax.fori_loop(0, count, query_block, (dq, zeros))
        d_key = tuple(a.astype(v.dtype) for a in d_key)
        d_block, d_weight = pull(d_key)
        d_keys_BSJ = jax.lax.dynamic_update_slice_in_dim(d_keys_BSJ, d_block, j * how.block, axis=1)
        return dq, d_keys_BSJ, d_weight_LI + d_weight

    carry = (
        [jnp.zeros(a.shape, jnp.float32) for a in q_side[0][:2]],
        jnp.zeros_like(keys_BSJ),
        jnp.zeros_like(weight_LI),
    )
    dq, d_keys_BSJ, d_weight_LI = jax.lax.fori_loop(0, own.num_keys(), key_block, carry)
    d_nope, d_rope = (from_blocks(a).astype(q_nope.dtype) for a in dq)
    return d_nope, d_rope, d_keys_BSJ, d_weight_LI, None, None, None


_attend.defvjp(_forward_rule, _backward)

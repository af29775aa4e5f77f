"""Causal attention of MLA behind one function: exact, and never a T x T array.

The rope key is shared by all heads and stays unbroadcast in the interface. An implementation that
does not take its inputs raises NotImplementedError; the dispatcher goes on to the next one.
`mla_attention` keeps what its derivative needs; a caller that would rather store the output in its
own format takes the two passes of an `Attention` apart (`attention_fp8.py`).
Shape letters: B batch, T query tokens, S key tokens, N heads, P nope, R rope, H value head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from math import prod

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.errors import UserError, did_you_mean
from dsv3_jax.model import attention_cudnn as cudnn
from dsv3_jax.model import attention_kernels as kernels
from dsv3_jax.parallel.mesh import BATCH_AXES

BLOCK_TOKENS = 512  # most query or key tokens of a block of scores


@dataclass(frozen=True)
class Attention:
    """An implementation. `inputs` are q_nope, q_rope, k_nope, k_rope and v of `mla_attention`."""

    refuse: Callable  # (inputs, segments) -> None, or NotImplementedError with the reason
    attend: Callable  # (*inputs, segments, scale) -> o, differentiable
    forward: Callable  # (*inputs, segments, scale) -> o and what `backward` calls lse
    backward: Callable  # (inputs, segments, scale, o, lse, do) -> the gradients of the inputs
    is_kernel: bool = False  # XLA cannot partition it: every device runs it on its own sequences


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
    mesh: Mesh | None = None,
) -> jax.Array:
    """softmax over j <= t of scale * (q_nope.k_nope + q_rope.k_rope), times v (spec §2).

    Products take their operands in the input dtype and accumulate in float32; softmax is float32.

    Args:
      scale: multiplies the whole logit.
      segments_BT: int32 document numbers; a token attends to its own document only. S must be T.
      implementation: 'hopper', 'tpu', 'cudnn' or 'blockwise'; None takes the first that accepts
        the inputs.
      mesh: that B is split over; None on one device, and inside `shard_map`.

    Returns:
      [B, T, N, H] in v's dtype.

    Raises:
      UserError: unknown implementation.
      NotImplementedError: no implementation accepts the inputs; lists every reason.
    """
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH)
    attention = choose(inputs, segments_BT, implementation, mesh)
    return attention.attend(*inputs, segments_BT, scale)


def choose(
    inputs, segments_BT: jax.Array | None, implementation: str | None, mesh: Mesh | None
) -> Attention:
    """The implementation named, or the first that accepts the inputs; raises as `mla_attention`."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        hint = did_you_mean(implementation, IMPLEMENTATIONS)
        raise UserError(
            f"attention {implementation!r} is unknown;{hint} allowed: {', '.join(IMPLEMENTATIONS)}"
        )
    reasons = []
    for name in (implementation,) if implementation else IMPLEMENTATIONS:
        try:
            IMPLEMENTATIONS[name].refuse(inputs, segments_BT)
            return on_mesh(IMPLEMENTATIONS[name], mesh, inputs[0].shape[0])
        except NotImplementedError as reason:
            reasons.append(f"{name}: {reason}")
    raise NotImplementedError("no attention accepts these inputs; " + "; ".join(reasons))


def on_mesh(attention: Attention, mesh: Mesh | None, num_sequences: int) -> Attention:
    """The implementation for sequences that are split over a mesh."""
    if mesh is None or not attention.is_kernel:
        return attention
    num_shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    if num_sequences % num_shards:
        raise NotImplementedError(f"takes no {num_sequences} sequences on {num_shards} devices")
    return _on_each_device(attention, mesh)


@lru_cache
def _on_each_device(attention: Attention, mesh: Mesh) -> Attention:
    shards = partial(jax.shard_map, mesh=mesh, check_vma=False)
    specs = dict(in_specs=PartitionSpec(BATCH_AXES), out_specs=PartitionSpec(BATCH_AXES))

    def forward(*inputs_segments_scale):
        *arrays, scale = inputs_segments_scale
        return shards(lambda *arrays: attention.forward(*arrays, scale), **specs)(*arrays)

    def backward(inputs, segments, scale, *o_lse_do):
        def one(inputs, segments, *o_lse_do):
            return attention.backward(inputs, segments, scale, *o_lse_do)

        return shards(one, **specs)(inputs, segments, *o_lse_do)

    return by_passes(attention.refuse, forward, backward)


def by_passes(refuse: Callable, forward: Callable, backward: Callable) -> Attention:
    """A kernel's two passes as one differentiable function.

    The output and the log-sum-exp are named, as the blockwise form names them.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(6,))
    def attend(*inputs_segments_scale):
        return forward(*inputs_segments_scale)[0]

    def forward_rule(*inputs_segments_scale):
        o_BTNH, lse = forward(*inputs_segments_scale)
        o_BTNH = checkpoint_name(o_BTNH, "attention_out")
        lse = checkpoint_name(lse, "attention_lse")
        *inputs, segments, _ = inputs_segments_scale
        return o_BTNH, (tuple(inputs), segments, o_BTNH, lse)

    def backward_rule(scale, residuals, do_BTNH):
        inputs, segments, *o_lse = residuals
        return *backward(inputs, segments, scale, *o_lse, do_BTNH), None

    attend.defvjp(forward_rule, backward_rule)
    return Attention(refuse, attend, forward, backward, is_kernel=True)


def by_differentiation(attend: Callable) -> tuple[Callable, Callable]:
    """The two passes of a function that can only be differentiated whole: it runs once more."""

    def forward(*inputs_segments_scale):
        return attend(*inputs_segments_scale), None

    def backward(inputs, segments, scale, o, lse, do):
        return jax.vjp(lambda *inputs: attend(*inputs, segments, scale), *inputs)[1](do)

    return forward, backward


def _refuse_blockwise(inputs, segments_BT) -> None:
    if inputs[0].shape[1] != inputs[2].shape[1]:
        raise NotImplementedError("takes as many keys as queries")


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
    inputs = (q_nope_BTNP, q_rope_BTNR, k_nope_BSNP, k_rope_BSR, v_BSNH)
    num_tokens = q_nope_BTNP.shape[1]
    arrays, block = _whole_blocks((*inputs, segments_BT), num_tokens, block_tokens)
    return _blockwise(*arrays, scale, block)[:, :num_tokens]


def _blockwise_forward(*inputs_segments_scale):
    *arrays, scale = inputs_segments_scale
    num_tokens = arrays[0].shape[1]
    arrays, block = _whole_blocks(arrays, num_tokens, BLOCK_TOKENS)
    return jax.tree.map(lambda a: a[:, :num_tokens], _forward(*arrays, scale, block))


def _blockwise_backward(inputs, segments, scale, o_BTNH, lse_BTN, do_BTNH):
    num_tokens = o_BTNH.shape[1]
    arrays = (*inputs, segments, o_BTNH, lse_BTN, do_BTNH)
    # Padding queries are zeros, so their scores are too, and their gradient is that of zeros.
    (*residuals, do_BTNH), block = _whole_blocks(arrays, num_tokens, BLOCK_TOKENS)
    gradients = _backward(scale, block, residuals, do_BTNH)
    return tuple(gradient[:, :num_tokens] for gradient in gradients[:5])


def _whole_blocks(arrays, num_tokens, block_tokens):
    """Arrays [B, T, ...] or None with T padded to a multiple of the block, and that block."""
    num_blocks = -(-num_tokens // block_tokens)
    block = -(-num_tokens // num_blocks)
    # Padding keys come after every real query and padding queries are dropped, so the causal mask
    # alone hides both.
    padding = num_blocks * block - num_tokens
    return jax.tree.map(lambda a: jnp.pad(a, _pad_tokens(a.ndim, padding)), arrays), block


def _pad_tokens(ndim: int, padding: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, padding)] + [(0, 0)] * (ndim - 2)


def to_blocks(x, block):
    """[B, T, ...] -> [T / block, B, block, ...]."""
    if x is None:
        return None
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def from_blocks(x):
    """[blocks, B, block, ...] -> [B, T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def dot32(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32)


def block_scores(q, k, i, j, scale):
    """Masked float32 scores [B, N, T, S] of query block i on key block j (nope, rope, segments)."""
    (q_nope, q_rope, q_segments), (k_nope, k_rope, k_segments) = q, k
    scores = dot32("BTNP,BSNP->BNTS", q_nope, k_nope) + dot32("BTNR,BSR->BNTS", q_rope, k_rope)
    block = q_nope.shape[1]
    row, column = jnp.arange(block)[:, None], jnp.arange(block)
    visible = (i * block + row >= j * block + column)[None, None]
    if q_segments is not None:
        visible &= (q_segments[:, :, None] == k_segments[:, None, :])[:, None]
    return jnp.where(visible, scores * scale, -jnp.inf)


def softmax_start(batch, heads, block, width):
    """What `softmax_step` begins with: output, sum and maximum of no key at all, float32."""
    rows = (batch, heads, block)
    return (
        jnp.zeros((*rows, width), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full(rows, -jnp.inf, jnp.float32),
    )


def softmax_step(carry, scores, v):
    """Takes in the keys of a block. The first block must show every query at least one key."""
    o_BNTH, total_BNT, maximum_BNT = carry
    new_maximum = jnp.maximum(maximum_BNT, scores.max(-1))
    p = jnp.exp(scores - new_maximum[..., None])
    rescale = jnp.exp(maximum_BNT - new_maximum)
    o_BNTH = o_BNTH * rescale[..., None] + dot32("BNTS,BSNH->BNTH", p.astype(v.dtype), v)
    return o_BNTH, total_BNT * rescale + p.sum(-1), new_maximum


def softmax_end(carry, dtype):
    """Output [..., T, N, H] and float32 log-sum-exp [..., T, N]."""
    o_BNTH, total_BNT, maximum_BNT = carry
    o_BTNH = jnp.swapaxes(o_BNTH / total_BNT[..., None], -3, -2).astype(dtype)
    return o_BTNH, jnp.swapaxes(maximum_BNT + jnp.log(total_BNT), -2, -1)


def block_gradients(q_side, k, v, i, j, scale):
    """Float32 gradients of query block i and key block j: q_nope, q_rope, k_nope, k_rope, v.

    Args:
      q_side: (q_nope, q_rope, segments), d output, log-sum-exp, and output . d output.
    """
    q, do, lse, delta = q_side
    lse_BNT, delta_BNT = jnp.swapaxes(lse, 1, 2), jnp.swapaxes(delta, 1, 2)
    p = jnp.exp(block_scores(q, k, i, j, scale) - lse_BNT[..., None])
    dp = dot32("BTNH,BSNH->BNTS", do, v)
    ds = (p * (dp - delta_BNT[..., None]) * scale).astype(v.dtype)
    dq_nope = dot32("BNTS,BSNP->BTNP", ds, k[0])
    # Heads first, then swapped: XLA's CPU backend lacks the direct bfloat16 contraction.
    dq_rope = jnp.swapaxes(dot32("BNTS,BSR->BNTR", ds, k[1]), 1, 2)
    dk_nope = dot32("BNTS,BTNP->BSNP", ds, q[0])
    dk_rope = dot32("BNTS,BTNR->BSR", ds, q[1])
    return dq_nope, dq_rope, dk_nope, dk_rope, dot32("BNTS,BTNH->BSNH", p.astype(v.dtype), do)


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _blockwise(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block):
    return _forward(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block)[0]


def _forward_rule(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block):
    o_BTNH, lse_BTN = _forward(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block)
    # Named here so that recomputation policies can keep both and skip this pass (block.py).
    o_BTNH = checkpoint_name(o_BTNH, "attention_out")
    lse_BTN = checkpoint_name(lse_BTN, "attention_lse")
    return o_BTNH, (q_nope, q_rope, k_nope, k_rope, v, segments, o_BTNH, lse_BTN)


def _forward(q_nope, q_rope, k_nope, k_rope, v, segments, scale, block):
    q_blocks, k_blocks, v_blocks = jax.tree.map(
        partial(to_blocks, block=block),
        ((q_nope, q_rope, segments), (k_nope, k_rope, segments), v),
    )

    def query_block(_, inputs):
        i, q = inputs

        def key_block(step, carry):
            j = i - step  # own block first: from then on every query has seen at least itself
            k, v_j = jax.tree.map(lambda a: a[j], (k_blocks, v_blocks))
            return softmax_step(carry, block_scores(q, k, i, j, scale), v_j)

        batch, _, heads, _ = q_nope.shape
        start = softmax_start(batch, heads, block, v.shape[-1])
        return None, softmax_end(jax.lax.fori_loop(0, i + 1, key_block, start), v.dtype)

    num_blocks = q_blocks[0].shape[0]
    _, (o, lse) = jax.lax.scan(query_block, None, (jnp.arange(num_blocks), q_blocks))
    return from_blocks(o), from_blocks(lse)


def _backward(scale, block, residuals, do_BTNH):
    q_nope, q_rope, k_nope, k_rope, v, segments, o_BTNH, lse_BTN = residuals
    delta_BTN = jnp.sum(do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32), axis=-1)
    per_query = ((q_nope, q_rope, segments), do_BTNH.astype(v.dtype), lse_BTN, delta_BTN)
    per_key = ((k_nope, k_rope, segments), v)
    q_side, k_side = jax.tree.map(partial(to_blocks, block=block), (per_query, per_key))
    num_blocks = q_side[0][0].shape[0]

    def key_block(dq, inputs):
        j, (k, v_j) = inputs

        def query_block(i, carry):
            dq_nope, dq_rope, dk_nope, dk_rope, dv = carry
            q_block = jax.tree.map(lambda a: a[i], q_side)
            added = block_gradients(q_block, k, v_j, i, j, scale)
            dq_nope, dq_rope = dq_nope.at[i].add(added[0]), dq_rope.at[i].add(added[1])
            return dq_nope, dq_rope, dk_nope + added[2], dk_rope + added[3], dv + added[4]

        zeros = [jnp.zeros(a.shape, jnp.float32) for a in (k[0], k[1], v_j)]
        dq_nope, dq_rope, *d_key = jax.lax.fori_loop(j, num_blocks, query_block, (*dq, *zeros))
        return (dq_nope, dq_rope), d_key

    dq = [jnp.zeros(a.shape, jnp.float32) for a in q_side[0][:2]]
    dq, d_key = jax.lax.scan(key_block, tuple(dq), (jnp.arange(num_blocks), k_side))
    gradients = [from_blocks(g) for g in (*dq, *d_key)]
    primals = (q_nope, q_rope, k_nope, k_rope, v)
    return *(g.astype(x.dtype) for g, x in zip(gradients, primals, strict=True)), None


_blockwise.defvjp(_forward_rule, _backward)

_CUDNN_PASSES = (
    (cudnn.forward, cudnn.backward) if cudnn.has_passes() else by_differentiation(cudnn.attend)
)
# In the order of preference.
IMPLEMENTATIONS = {
    "hopper": by_passes(*kernels.passes("hopper")),
    "tpu": by_passes(*kernels.passes("tpu")),
    "cudnn": Attention(cudnn.refuse, cudnn.attend, *_CUDNN_PASSES),
    "blockwise": Attention(
        _refuse_blockwise, blockwise_attention, _blockwise_forward, _blockwise_backward
    ),
}

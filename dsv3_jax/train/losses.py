"""The training loss: chunked cross-entropy, multi-token prediction (spec §4), balance (spec §3)."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import BalanceConfig
from dsv3_jax.parallel.context import token_axes, token_spec
from pallas_kernels.cross_entropy import cross_entropy_rows

LOGITS_BUDGET = 2**27  # float32 logits held at once by a device: 512 MiB


class Losses(NamedTuple):
    """Float32 scalars; `total` is what the gradient is taken of."""

    total: jax.Array
    main: jax.Array  # next-token cross-entropy, nats
    mtp: jax.Array  # mean over depths of L^k, before lambda
    balance: jax.Array  # sum over layers, weights applied
    overflow: jax.Array  # rows without room at their experts: above 0 the others mean nothing


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    compute_dtype: jnp.dtype,
    mesh: Mesh | None = None,
    logits_budget: int = LOGITS_BUDGET,
) -> jax.Array:
    """Sum over tokens of weight * -log softmax(hidden head)[target], a float32 scalar.

    Logits exist for a chunk of tokens at a time. Matmul operands are in `compute_dtype`, sums and
    the head's gradient in float32. With a mesh every device handles its own tokens, so that the
    head's gradient crosses the network once and not once a chunk.
    """
    per_shard = partial(_sum_of_losses, compute_dtype, logits_budget)
    if mesh is None:
        return per_shard(hidden_BTD, head_DV, targets_BT, weights_BT)
    num_tokens = targets_BT.shape[1]
    tokens = token_spec(mesh, num_tokens)
    sharded = jax.shard_map(
        lambda *args: per_shard(*args)[None],
        mesh=mesh,
        in_specs=(tokens, P(), tokens, tokens),
        out_specs=P(token_axes(mesh, num_tokens)),
        check_vma=False,
    )
    return jnp.sum(sharded(hidden_BTD, head_DV, targets_BT, weights_BT))


def _chunks(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, weights_BT):
    """The head in the compute dtype, and tokens as [C, X, ...] in as few chunks as may be."""
    tokens, vocab = targets_BT.size, head_DV.shape[1]
    limit = max(1, budget // vocab)
    count = next(c for c in range(1, tokens + 1) if tokens % c == 0 and tokens // c <= limit)
    chunked = (
        hidden_BTD.astype(compute_dtype).reshape(count, -1, hidden_BTD.shape[-1]),
        targets_BT.reshape(count, -1),
        weights_BT.reshape(count, -1),
    )
    return head_DV.astype(compute_dtype), chunked


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum_of_losses(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, weights_BT):
    head, chunks = _chunks(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, weights_BT)

    def add(total, chunk):
        hidden_XD, targets_X, weights_X = chunk
        logits_XV = jnp.einsum("XD,DV->XV", hidden_XD, head, preferred_element_type=jnp.float32)
        loss_X, _ = cross_entropy_rows(
            logits_XV, targets_X, weights_X, compute_dtype, implementation="reference"
        )
        return total + loss_X.sum(), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, weights_BT):
    """The gradients are made with the loss, from the same logits: backward only scales them."""
    head, chunks = _chunks(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, weights_BT)

    def add(carry, chunk):
        total, d_head_DV = carry
        hidden_XD, targets_X, weights_X = chunk
        logits_XV = jnp.einsum("XD,DV->XV", hidden_XD, head, preferred_element_type=jnp.float32)
        loss_X, d_logits_XV = cross_entropy_rows(logits_XV, targets_X, weights_X, compute_dtype)
        d_hidden_XD = jnp.einsum("XV,DV->XD", d_logits_XV, head, preferred_element_type=jnp.float32)
        d_head_DV += jnp.einsum(
            "XD,XV->DV", hidden_XD, d_logits_XV, preferred_element_type=jnp.float32
        )
        return (total + loss_X.sum(), d_head_DV), d_hidden_XD.astype(hidden_BTD.dtype)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(head_DV.shape, jnp.float32))
    (total, d_head_DV), d_hidden = jax.lax.scan(add, start, chunks)
    return total, (d_hidden.reshape(hidden_BTD.shape), d_head_DV)


def _backward(compute_dtype, budget, gradients, d_total):
    d_hidden_BTD, d_head_DV = gradients
    return (d_total * d_hidden_BTD).astype(d_hidden_BTD.dtype), d_total * d_head_DV, None, None


_sum_of_losses.defvjp(_forward, _backward)


def token_logprobs(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    *,
    compute_dtype: jnp.dtype,
    mesh: Mesh | None = None,
    logits_budget: int = LOGITS_BUDGET,
) -> tuple[jax.Array, jax.Array]:
    """log softmax(hidden head)[target], and the entropy of that softmax: float32 [B, T], nats.

    As in `cross_entropy` logits exist for a chunk of tokens at a time, and every device handles its
    own tokens. The backward pass makes them again. No gradient flows through the entropy.
    """
    per_shard = partial(_logprobs, compute_dtype, logits_budget)
    if mesh is None:
        return per_shard(hidden_BTD, head_DV, targets_BT)
    tokens = token_spec(mesh, targets_BT.shape[1])
    return jax.shard_map(
        per_shard, mesh=mesh, in_specs=(tokens, P(), tokens), out_specs=tokens, check_vma=False
    )(hidden_BTD, head_DV, targets_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _logprobs(compute_dtype, budget, hidden_BTD, head_DV, targets_BT):
    no_weights_BT = jnp.zeros(targets_BT.shape, jnp.float32)
    head, chunks = _chunks(compute_dtype, budget, hidden_BTD, head_DV, targets_BT, no_weights_BT)

    def of_chunk(chunk):
        hidden_XD, targets_X, _ = chunk
        logits_XV = jnp.einsum("XD,DV->XV", hidden_XD, head, preferred_element_type=jnp.float32)
        logprob_XV = jax.nn.log_softmax(logits_XV, axis=-1)
        target_X = jnp.take_along_axis(logprob_XV, targets_X[:, None], axis=-1)[:, 0]
        return target_X, -jnp.sum(jnp.exp(logprob_XV) * logprob_XV, axis=-1)

    logprob, entropy = jax.lax.map(of_chunk, chunks)
    return logprob.reshape(targets_BT.shape), entropy.reshape(targets_BT.shape)


def _logprobs_forward(compute_dtype, budget, *args):
    return _logprobs(compute_dtype, budget, *args), args


def _logprobs_backward(compute_dtype, budget, args, gradients):
    # The gradient of sum(g log p) is that of a cross-entropy with weights -g.
    _, (d_hidden_BTD, d_head_DV) = _forward(compute_dtype, budget, *args, -gradients[0])
    return d_hidden_BTD, d_head_DV, None


_logprobs.defvjp(_logprobs_forward, _logprobs_backward)


def targets_and_weights(
    tokens_BT1: jax.Array, segments_BT1: jax.Array | None, depth: int
) -> tuple[jax.Array, jax.Array]:
    """What position i predicts at a depth (0 = main model), and whether it counts.

    Position i predicts token i + depth + 1 (spec §4). The last `depth` positions have no target;
    with segments, nor has a position whose target is padding (0) or in another document.

    Returns:
      targets_BT int32, weights_BT float32 0 or 1, T being one less than the tokens given.
    """
    ahead = ((0, 0), (0, depth))
    targets_BT = jnp.pad(tokens_BT1[:, depth + 1 :], ahead)
    T = targets_BT.shape[1]
    counts_BT = jnp.broadcast_to(jnp.arange(T) < T - depth, targets_BT.shape)
    if segments_BT1 is not None:
        target_segments_BT = jnp.pad(segments_BT1[:, depth + 1 :], ahead)
        counts_BT &= (segments_BT1[:, :-1] == target_segments_BT) & (target_segments_BT != 0)
    return targets_BT, counts_BT.astype(jnp.float32)


def balance_loss(stats, balance: BalanceConfig) -> jax.Array:
    """Weighted balance losses, summed over the layers of `stats` (spec §3; unpublished, §13)."""
    terms = {
        "none": (),
        "loss_free": ((balance.sequence_weight, stats.sequence_loss),),
        "auxiliary": (
            (balance.sequence_weight, stats.sequence_loss),
            (balance.expert_weight, stats.expert_loss),
            (balance.device_weight, stats.device_loss),
            (balance.communication_weight, stats.communication_loss),
        ),
    }[balance.method]
    return sum((weight * jnp.sum(loss) for weight, loss in terms), jnp.zeros((), jnp.float32))


def model_losses(
    model, batch: dict[str, jax.Array], balance: BalanceConfig, mtp_weight: jax.Array | float
) -> tuple[Losses, jax.Array]:
    """Losses of one micro-batch: L = L_main + lambda/D sum_k L^k + sum L_bal (spec §3, §4).

    L_main averages over the B*T tokens. L^k has T-k terms a sequence and the divisor T, as printed.
    With segments only the positions that count are averaged over; with weights it is their sum.

    Args:
      model: a `DeepSeekV3`.
      batch: "tokens" [B, T+1] and, for separated documents, "segments" [B, T+1]; "weights"
        [B, T+1], float32, is what a token's loss is multiplied by where it is the target.
      mtp_weight: lambda of spec §4.

    Returns:
      The losses, and counts_E of every MoE layer, stacked: tokens routed to each expert.
    """
    main_BTD, mtp_hidden, stats = model.hidden_states(
        batch["tokens"][:, :-1], segments_BT=input_segments(batch)
    )
    main, mtp = token_losses(model, main_BTD, mtp_hidden, batch, num_targets(batch))
    balance_sum = balance_loss(stats, balance)
    total = main + mtp_weight * mtp + balance_sum
    return Losses(total, main, mtp, balance_sum, jnp.sum(stats.overflow)), stats.counts_E


def token_losses(
    model,
    main_BTD: jax.Array,
    mtp_hidden: Sequence[jax.Array],
    batch: dict[str, jax.Array],
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """L_main and the mean of L^k over the depths, both over `count` positions (`num_targets`)."""
    main = _summed_loss(model, main_BTD, batch, 0) / count
    depths = [
        _summed_loss(model, hidden_BTD, batch, depth) / count
        for depth, hidden_BTD in enumerate(mtp_hidden, start=1)
    ]
    return main, sum(depths) / len(depths) if depths else jnp.zeros((), jnp.float32)


def num_targets(batch: dict[str, jax.Array]) -> jax.Array:
    """What sums over a micro-batch are divided by, float32: its positions with a next token.

    At least 1. With "weights" it is 1: they are normalised over all micro-batches of a step.
    """
    if "weights" in batch:
        return jnp.ones((), jnp.float32)
    _, weights_BT = targets_and_weights(batch["tokens"], batch.get("segments"), 0)
    return jnp.maximum(jnp.sum(weights_BT), 1.0)


def evaluation_loss(model, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean next-token cross-entropy of the main model on one batch, nats; nothing is updated."""
    hidden_BTD, _, _ = model.hidden_states(
        batch["tokens"][:, :-1], segments_BT=input_segments(batch), mtp=False
    )
    return _summed_loss(model, hidden_BTD, batch, 0) / num_targets(batch)


def input_segments(batch: dict[str, jax.Array]) -> jax.Array | None:
    """Documents of the T tokens that the model reads, or None."""
    segments_BT1 = batch.get("segments")
    return None if segments_BT1 is None else segments_BT1[:, :-1]


def position_targets(batch: dict[str, jax.Array], depth: int) -> tuple[jax.Array, jax.Array]:
    """`targets_and_weights` of a batch, times its "weights" where it has them."""
    targets_BT, weights_BT = targets_and_weights(batch["tokens"], batch.get("segments"), depth)
    if "weights" in batch:
        weights_BT = weights_BT * jnp.pad(batch["weights"][:, depth + 1 :], ((0, 0), (0, depth)))
    return targets_BT, weights_BT


def _summed_loss(model, hidden_BTD, batch, depth):
    """Sum over the positions that have a target at a depth."""
    targets_BT, weights_BT = position_targets(batch, depth)
    return cross_entropy(
        hidden_BTD,
        model.head.kernel[...],
        targets_BT,
        weights_BT,
        compute_dtype=model.runtime.compute_dtype,
        mesh=model.runtime.mesh,
    )

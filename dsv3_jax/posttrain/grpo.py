"""Group-relative policy optimisation (spec §10.3): advantages, objective, and the loss of a model.

Shape letters: N answers, G answers to one problem, B rows of a micro-batch (an answer each, after
its prompt), T positions, L MoE layers, K experts a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import BalanceConfig, GrpoConfig
from dsv3_jax.model.router import ReplayedChoice
from dsv3_jax.train.losses import balance_loss, input_segments, token_logprobs


def group_advantages(
    rewards_N: np.ndarray, valid_N: np.ndarray, group_size: int, *, sample_std: bool = False
) -> np.ndarray:
    """A_i = (r_i - mean(r)) / std(r) over the answers to one problem, float32 [N].

    Args:
      rewards_N: G consecutive ones belong together.
      valid_N: bool; an answer whose reward failed has advantage 0 and is in no mean.
      sample_std: divide by G - 1 instead of G; unpublished.

    Returns:
      0 for all of a group whose rewards are equal, or of which none or one is valid: it teaches
      nothing (spec §10.3, traps).
    """
    rewards_XG = np.asarray(rewards_N, np.float64).reshape(-1, group_size)
    valid_XG = np.asarray(valid_N, bool).reshape(-1, group_size)
    advantages_XG = np.zeros(rewards_XG.shape)
    for rewards, valid, out in zip(rewards_XG, valid_XG, advantages_XG, strict=True):
        group = rewards[valid]
        # Not std > 0: equal rewards may differ from their mean in the last bit.
        if len(group) > 1 and group.min() < group.max():
            out[valid] = (group - group.mean()) / group.std(ddof=int(sample_std))
    return advantages_XG.reshape(-1).astype(np.float32)


class Objective(NamedTuple):
    """Float32 scalars, all but `loss` means over answers of means over their tokens."""

    loss: jax.Array  # -J
    kl: jax.Array  # of the form's ratio: to the reference policy, at least 0
    clipped: jax.Array  # share of ratios where the clip decides
    ratio: jax.Array  # pi_theta / pi_old


def objective(
    logprobs_BT: jax.Array,
    old_BT: jax.Array,
    reference_BT: jax.Array,
    mask_BT: jax.Array,
    advantages_B: jax.Array,
    config: GrpoConfig,
) -> Objective:
    """-J of spec §10.3 for B answers; its gradient flows through `logprobs_BT` alone.

    Form 'token' (Math eq. 3): ratio and KL of every token, averaged over the answer's own tokens,
    then over answers. Form 'sequence' (as V3 and R1 print it): ratio and KL of the whole answer.

    Args:
      logprobs_BT: log pi_theta of the tokens, float32 nats.
      old_BT, reference_BT: those of the policy that sampled, and of the reference policy.
      mask_BT: bool, True for an answer's tokens; an answer without any counts as 0.
    """
    log_ratio_BT = jnp.where(mask_BT, logprobs_BT - old_BT, 0.0)
    log_reference_BT = jnp.where(mask_BT, reference_BT - logprobs_BT, 0.0)
    if config.form == "sequence":
        log_ratio_BT = jnp.sum(log_ratio_BT, axis=1, keepdims=True)
        log_reference_BT = jnp.sum(log_reference_BT, axis=1, keepdims=True)
        mask_BT = jnp.any(mask_BT, axis=1, keepdims=True)

    def mean(x_BT: jax.Array) -> jax.Array:
        of_answer_B = jnp.sum(x_BT * mask_BT, axis=1) / jnp.maximum(jnp.sum(mask_BT, axis=1), 1)
        return jnp.mean(of_answer_B)

    ratio_BT = jnp.exp(log_ratio_BT)
    plain_BT = ratio_BT * advantages_B[:, None]
    low, high = 1.0 - config.clip_epsilon, 1.0 + config.clip_epsilon
    clipped_BT = jnp.clip(ratio_BT, low, high) * advantages_B[:, None]
    kl_BT = jnp.expm1(log_reference_BT) - log_reference_BT
    surrogate_BT = jnp.minimum(plain_BT, clipped_BT)
    return Objective(
        loss=-mean(surrogate_BT - config.kl_weight * kl_BT),
        kl=mean(kl_BT),
        clipped=mean(clipped_BT < plain_BT),
        ratio=mean(ratio_BT),
    )


class PolicyLosses(NamedTuple):
    """What `make_train_step` wants of a loss, and what is reported beside it."""

    total: jax.Array
    main: jax.Array  # -J
    mtp: jax.Array  # 0: MTP modules do not take part (unpublished, spec §13)
    balance: jax.Array
    overflow: jax.Array
    kl: jax.Array
    clipped: jax.Array
    ratio: jax.Array
    entropy: jax.Array  # of the policy at the answers' tokens, nats


def policy_losses(
    model,
    batch: dict[str, jax.Array],
    balance: BalanceConfig,
    mtp_weight: jax.Array | float,
    *,
    config: GrpoConfig,
) -> tuple[PolicyLosses, jax.Array]:
    """-J plus the balance losses of one micro-batch; see `losses.model_losses`.

    Args:
      batch: "tokens" and "segments" [B, T+1], "mask" bool, "old" and "reference" float32 [B, T],
        "advantages" [B]; with routing replay "routes" int32 [B, L, T, K].
      mtp_weight: has no effect.

    Returns:
      The losses, and counts_E of every MoE layer; those of MTP's, which do not run, are equal, so
      that their bias stays.
    """
    if "routes" in batch:
        model.moe_blocks.ffn.router.replay = nnx.data(
            ReplayedChoice(jnp.moveaxis(batch["routes"], 1, 0))
        )
    logprobs_BT, entropy_BT, stats = policy_logprobs(model, batch, config.temperature)
    result = objective(
        logprobs_BT,
        batch["old"],
        batch["reference"],
        batch["mask"],
        batch["advantages"],
        config,
    )
    mask_BT = batch["mask"]
    entropy_B = jnp.sum(entropy_BT * mask_BT, 1) / jnp.maximum(jnp.sum(mask_BT, 1), 1)
    balance_sum = balance_loss(stats, balance)
    losses = PolicyLosses(
        total=result.loss + balance_sum,
        main=result.loss,
        mtp=jnp.zeros((), jnp.float32),
        balance=balance_sum,
        overflow=jnp.sum(stats.overflow),
        kl=result.kl,
        clipped=result.clipped,
        ratio=result.ratio,
        entropy=jnp.mean(entropy_B),
    )
    mtp_counts_LE = jnp.ones((model.config.mtp_depth, model.config.num_experts), jnp.float32)
    return losses, jnp.concatenate([stats.counts_E, mtp_counts_LE])


def policy_logprobs(model, batch: dict[str, jax.Array], temperature: float):
    """log pi of each position's next token, the entropy there, both [B, T], and routing statistics.

    pi is what tokens were sampled from: softmax(logits / temperature).
    """
    hidden_BTD, _, stats = model.hidden_states(
        batch["tokens"][:, :-1], segments_BT=input_segments(batch), mtp=False
    )
    logprobs_BT, entropy_BT = token_logprobs(
        hidden_BTD / temperature,
        model.head.kernel[...],
        batch["tokens"][:, 1:],
        compute_dtype=model.runtime.compute_dtype,
        mesh=model.runtime.mesh,
    )
    return logprobs_BT, entropy_BT, stats


def make_score(graphdef: nnx.GraphDef, temperature: float, *, routes: bool = False):
    """Compiles `score(params, router_bias, batches) -> (logprobs_ABT, routes_ABLTK or None)`.

    Args:
      routes: whether to return the experts that every token was sent to.
    """

    def score(params, router_bias, batches):
        def one(batch):
            model = nnx.merge(graphdef, params, router_bias)
            model.moe_blocks.ffn.router.reports_choice = routes
            logprobs_BT, _, stats = policy_logprobs(model, batch, temperature)
            return logprobs_BT, jnp.moveaxis(stats.ids_BTK, 0, 1) if routes else None

        return jax.lax.map(one, batches)

    return jax.jit(score)

"""The router of DeepSeekMoE (spec §3): which experts, with what weight, and how evenly.

Affinities, weights, bias and counts are float32. Shape letters: `shapes.md`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import parameter
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.precision.policy import dot


class RouterBias(nnx.Variable):
    """The selection bias b_E: float32, no gradient, moved by `update_bias` only."""


class ReplayedChoice(nnx.Variable):
    """int32 [B, T, K]: the experts that a router is to choose again; no gradient."""


class RouterStats(NamedTuple):
    """Load of one layer over the whole (global) batch; masked tokens are left out everywhere.

    The losses are unweighted float32 scalars: means over sequences of the formulas in spec §3.
    """

    counts_E: jax.Array  # float32, tokens routed to each expert
    sequence_loss: jax.Array  # V3's sequence-wise loss
    expert_loss: jax.Array  # V2's three losses; a group is a device
    device_loss: jax.Array
    communication_loss: jax.Array
    overflow: jax.Array  # float32, rows and pairs without room at their experts: 0, or no result
    ids_BTK: jax.Array | None = None  # int32, what was chosen; of routers with `reports_choice`


class Router(nnx.Module):
    """Affinity, biased group-limited choice and unbiased weights (spec §3, steps 1-5)."""

    def __init__(self, config: ModelConfig, *, runtime: Runtime, rngs: nnx.Rngs):
        self.kernel = parameter(
            rngs, (config.width, config.num_experts), ("embed", None), config.init_std
        )
        self.bias = RouterBias(jnp.zeros((config.num_experts,), jnp.float32))
        # Routing replay (posttrain/grpo.py) sets these two on a model for one forward pass.
        self.reports_choice = False
        self.replay: ReplayedChoice | None = None
        self.config = config
        self.runtime = runtime

    def __call__(
        self, u_BTD: jax.Array, token_mask_BT: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, RouterStats]:
        """Returns ids_BTK (int32), weights_BTK (float32) and the statistics of the batch.

        `token_mask_BT` is True for the tokens that count in the statistics; every token is routed.
        """
        logits_BTE = dot(u_BTD, self.kernel[...], self.runtime.compute_dtype, jnp.float32)
        scores_BTE = affinities(logits_BTE, self.config)
        if self.replay is None:
            ids_BTK = choose_experts(scores_BTE, self.bias[...], self.config)
        else:
            ids_BTK = self.replay[...]
        # Kept by the 'paper' policy: recomputed scores may differ in the last bit, and the choice
        # must not change between the forward and the backward pass.
        ids_BTK = checkpoint_name(ids_BTK, "routing")
        weights_BTK = mixing_weights(scores_BTE, ids_BTK, self.config)
        stats = load_stats(scores_BTE, ids_BTK, self.config, token_mask_BT)
        if self.reports_choice:
            stats = stats._replace(ids_BTK=ids_BTK)
        return ids_BTK, weights_BTK, stats


def affinities(logits_E: jax.Array, config: ModelConfig) -> jax.Array:
    """s [..., E]: a sigmoid an expert (V3), or a softmax over them (V2)."""
    if config.affinity == "sigmoid":
        return jax.nn.sigmoid(logits_E)
    return jax.nn.softmax(logits_E, axis=-1)


def choose_experts(scores_E: jax.Array, bias_E: jax.Array, config: ModelConfig) -> jax.Array:
    """Top-K of s + b inside the best groups: int32 [..., K], best first, ties to the lowest id.

    A group's score is the sum of its two best biased scores (V3) or its best one (V2). Experts of
    the other groups score -inf, so none of them wins even when every biased score is negative.
    """
    biased_E = jax.lax.stop_gradient(scores_E) + bias_E
    if config.num_groups > 1:
        group_size = config.num_experts // config.num_groups
        biased_GE = biased_E.reshape(*biased_E.shape[:-1], config.num_groups, group_size)
        best_of_group = {"top2_sum": 2, "max": 1}[config.group_score]
        scores_G = jax.lax.top_k(biased_GE, best_of_group)[0].sum(-1)
        kept_groups = jax.lax.top_k(scores_G, config.num_groups_kept)[1]
        kept_G = _membership(kept_groups, config.num_groups)
        biased_E = jnp.where(kept_G[..., None], biased_GE, -jnp.inf).reshape(biased_E.shape)
    return jax.lax.top_k(biased_E, config.experts_per_token)[1]


def mixing_weights(scores_E: jax.Array, ids_K: jax.Array, config: ModelConfig) -> jax.Array:
    """g [..., K] from the unbiased affinities of the chosen experts (spec §3, step 5)."""
    # A contraction with the one-hot of the choice, not a gather: its derivative is no scatter.
    chosen_KE = ids_K[..., None] == jnp.arange(config.num_experts)
    weights_K = jnp.sum(jnp.where(chosen_KE, scores_E[..., None, :], 0.0), axis=-1)
    if config.normalize_weights:
        weights_K = weights_K / (weights_K.sum(-1, keepdims=True) + 1e-20)
    return weights_K * config.routed_scaling_factor


def _membership(ids_K: jax.Array, size: int) -> jax.Array:
    """bool [..., size]: is it among the ids?"""
    return jnp.any(ids_K[..., None] == jnp.arange(size), axis=-2)


def load_stats(
    scores_BTE: jax.Array,
    ids_BTK: jax.Array,
    config: ModelConfig,
    token_mask_BT: jax.Array | None = None,
) -> RouterStats:
    """Expert counts of the batch and the balance losses (spec §3).

    With f_i = E / (K T) * (tokens that choose i), a constant, over the T unmasked tokens of one
    sequence, the sequence-wise loss is sum_i f_i P_i: a token chooses the K best raw affinities, no
    bias and no group limit, and P_i is the mean of s_i / sum_j s_j, through which the gradient
    flows. V2's losses use the real choice and, as printed, the mean P_i of the affinity itself:
    sum_i f_i P_i, sum_g mean(f)_g sum(P)_g, and the same with f_g = G / (kept groups * T) *
    (tokens sent to group g).
    """
    num_experts, num_groups, top_k = config.num_experts, config.num_groups, config.experts_per_token
    if token_mask_BT is None:
        token_mask_BT = jnp.ones(scores_BTE.shape[:-1], bool)
    mask_BT1 = token_mask_BT.astype(jnp.float32)[..., None]
    tokens_B1 = jnp.maximum(mask_BT1.sum(1), 1.0)  # T of each sequence

    def tokens_with(choice_BT: jax.Array) -> jax.Array:
        return jnp.sum(choice_BT * mask_BT1, axis=1)

    chosen_BTE = _membership(ids_BTK, num_experts)
    count_BE = tokens_with(chosen_BTE)
    raw_ids_BTK = jax.lax.top_k(jax.lax.stop_gradient(scores_BTE), top_k)[1]
    raw_count_BE = checkpoint_name(tokens_with(_membership(raw_ids_BTK, num_experts)), "routing")
    shares_BTE = scores_BTE / scores_BTE.sum(-1, keepdims=True)
    share_BE = tokens_with(shares_BTE) / tokens_B1
    p_BE = tokens_with(scores_BTE) / tokens_B1

    def by_group(x_E: jax.Array) -> jax.Array:
        return x_E.reshape(*x_E.shape[:-1], num_groups, num_experts // num_groups)

    f_BE = num_experts / (top_k * tokens_B1) * count_BE
    p_BG = by_group(p_BE).sum(-1)
    sent_BG = tokens_with(by_group(chosen_BTE).any(-1))
    sent_f_BG = num_groups / (config.num_groups_kept * tokens_B1) * sent_BG
    raw_f_BE = num_experts / (top_k * tokens_B1) * raw_count_BE
    return RouterStats(
        counts_E=count_BE.sum(0),
        sequence_loss=jnp.sum(raw_f_BE * share_BE, axis=-1).mean(),
        expert_loss=jnp.sum(f_BE * p_BE, axis=-1).mean(),
        device_loss=jnp.sum(by_group(f_BE).mean(-1) * p_BG, axis=-1).mean(),
        communication_loss=jnp.sum(sent_f_BG * p_BG, axis=-1).mean(),
        overflow=jnp.zeros((), jnp.float32),  # known after the dispatch
    )


def update_bias(bias_E: jax.Array, counts_E: jax.Array, speed: jax.Array | float) -> jax.Array:
    """b + speed * sign(mean(c) - c) (spec §3): once an optimizer step, after it.

    Args:
      bias_E: float32 [..., E].
      counts_E: [..., E] tokens of the whole global batch: every device and micro-batch of the step.
      speed: gamma. sign(0) = 0, so an expert with exactly the mean load keeps its bias.
    """
    return bias_E + speed * jnp.sign(counts_E.mean(-1, keepdims=True) - counts_E)


def max_violation(counts_E: jax.Array) -> jax.Array:
    """MaxVio = (max load - mean load) / mean load over the last dim (spec §3)."""
    mean = counts_E.mean(-1)
    return (counts_E.max(-1) - mean) / mean

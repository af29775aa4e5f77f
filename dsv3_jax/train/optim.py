"""AdamW of spec §8 and §5.4: float32 masters, moments stored in bfloat16, decoupled weight decay.

The router bias is not a parameter: it never comes here (spec §3).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from dsv3_jax.config import OptimConfig


class AdamWState(NamedTuple):
    """`count` int32 [] updates made; `mean` and `variance` are trees like the parameters."""

    count: jax.Array
    mean: chex.ArrayTree
    variance: chex.ArrayTree


def decay_mask(params: chex.ArrayTree) -> chex.ArrayTree:
    """True for matrices, False for norm gains: the leaves that weight decay applies to (our choice;
    exclusions are unpublished, spec §13). Names decide, because stacked gains are 2-D too."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "gain", params)


def adamw(config: OptimConfig, moments_dtype: jnp.dtype) -> optax.GradientTransformationExtraArgs:
    """AdamW whose rate is an argument: `update(grads, state, params, learning_rate=lr)`.

    Arithmetic is float32 whatever the storage; the moments are rounded to nearest when stored, and
    the update is computed from their values before rounding.
    """
    beta1, beta2 = config.beta1, config.beta2

    def init(params):
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, moments_dtype), params)
        return AdamWState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(grads, state, params, *, learning_rate):
        count = state.count + 1
        mean_correction = 1.0 - beta1 ** count.astype(jnp.float32)
        variance_correction = 1.0 - beta2 ** count.astype(jnp.float32)

        def one(grad, mean, variance, param, decays):
            mean = beta1 * mean.astype(jnp.float32) + (1.0 - beta1) * grad
            variance = beta2 * variance.astype(jnp.float32) + (1.0 - beta2) * grad * grad
            step = mean / mean_correction
            step = step / (jnp.sqrt(variance / variance_correction) + config.epsilon)
            step = step + (config.weight_decay * param if decays else 0.0)
            return -learning_rate * step, mean.astype(moments_dtype), variance.astype(moments_dtype)

        leaves = jax.tree.map(one, grads, state.mean, state.variance, params, decay_mask(params))
        updates, mean, variance = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), leaves
        )
        return updates, AdamWState(count, mean, variance)

    return optax.GradientTransformationExtraArgs(init, update)


def clip_by_global_norm(grads: chex.ArrayTree, max_norm: float) -> tuple[chex.ArrayTree, jax.Array]:
    """Scales gradients to a global norm of at most `max_norm`; also returns the norm before."""
    norm = jnp.sqrt(sum(_squares(grads)))
    scale = jnp.minimum(1.0, max_norm / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    return jax.tree.map(lambda g: g * scale, grads), norm


def leaf_norms(grads: chex.ArrayTree) -> jax.Array:
    """float32 [leaves]; XLA makes them of the sums that `clip_by_global_norm` needs anyway."""
    return jnp.sqrt(jnp.stack(_squares(grads)))


def _squares(grads: chex.ArrayTree) -> list[jax.Array]:
    return [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]

"""The definition: softmax cross-entropy in float32 (spec §4)."""

import jax
import jax.numpy as jnp


def cross_entropy_rows_reference(
    logits_XV: jax.Array, targets_X: jax.Array, weights_X: jax.Array, dtype
) -> tuple[jax.Array, jax.Array]:
    """See `cross_entropy_rows`."""
    log_sum_X = jax.nn.logsumexp(logits_XV, axis=-1)
    target_X = jnp.take_along_axis(logits_XV, targets_X[:, None], axis=-1)[:, 0]
    probability_XV = jnp.exp(logits_XV - log_sum_X[:, None])
    is_target_XV = jnp.arange(logits_XV.shape[1]) == targets_X[:, None]
    d_logits_XV = ((probability_XV - is_target_XV) * weights_X[:, None]).astype(dtype)
    return (log_sum_X - target_X) * weights_X, d_logits_XV

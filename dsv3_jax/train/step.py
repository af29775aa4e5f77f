"""One optimizer step: accumulate micro-batches, clip, AdamW, then the router bias."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.model.router import max_violation, update_bias
from dsv3_jax.precision.fp8_weight import quantize_weights, with_masters
from dsv3_jax.precision.policy import fp8_recipe
from dsv3_jax.train.losses import evaluation_loss, model_losses
from dsv3_jax.train.optim import adamw, clip_by_global_norm
from dsv3_jax.train.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, shardings: TrainState
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles `step(state, batch, learning_rate, bias_speed, mtp_weight) -> (state, metrics)`.

    `batch` holds "tokens" [A, B, T+1] int32 (and "segments"): A micro-batches of B sequences. The
    state is donated. Metrics are float32 on device: `loss` (main), `loss_mtp`, `loss_balance`,
    `grad_norm` before clipping, `max_violation` per MoE layer, `counts` [layers, E].
    """
    optimizer = adamw(config.optim, jnp.dtype(config.precision.moments))
    recipe = fp8_recipe(config.precision)
    # Gradients go straight to the shard whose optimizer state needs them (ZeRO-1: reduce-scatter).
    gradient_shardings = shardings.opt_state.mean

    def gradients(state, quantized, mtp_weight, batch):
        def total_loss(params):
            params = with_masters(quantized, params)
            model = nnx.merge(graphdef, params, state.router_bias)
            losses, counts_LE = model_losses(model, batch, config.balance, mtp_weight)
            return losses.total, (losses, counts_LE)

        grads, (losses, counts_LE) = jax.grad(total_loss, has_aux=True)(state.params)
        return jax.lax.with_sharding_constraint(grads, gradient_shardings), losses, counts_LE

    def accumulated(state, mtp_weight, batches):
        """Sums in float32 over the A micro-batches."""
        # Once a step, not once a micro-batch: codes change only when their masters do.
        quantized = quantize_weights(state.params, recipe, shardings.params)
        gradients_of = partial(gradients, state, quantized, mtp_weight)
        first = jax.tree.map(lambda x: x[0], batches)
        if len(batches["tokens"]) == 1:
            return gradients_of(first)
        shapes = jax.eval_shape(gradients_of, first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

        def add(total, batch):
            return jax.tree.map(jnp.add, total, gradients_of(batch)), None

        return jax.lax.scan(add, zeros, batches)[0]

    def train_step(state, batches, learning_rate, bias_speed, mtp_weight):
        num_microbatches = len(batches["tokens"])
        grads, losses, counts_LE = accumulated(state, mtp_weight, batches)
        grads, losses = jax.tree.map(lambda x: x / num_microbatches, (grads, losses))
        grads, grad_norm = clip_by_global_norm(grads, config.optim.clip_norm)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        params = optax.apply_updates(state.params, updates)
        router_bias = state.router_bias
        if config.balance.method == "loss_free":  # once a step, after the optimizer (spec §3)
            router_bias = updated_router_bias(router_bias, counts_LE, bias_speed)
        metrics = {
            "loss": losses.main,
            "loss_mtp": losses.mtp,
            "loss_balance": losses.balance,
            "grad_norm": grad_norm,
            "max_violation": max_violation(counts_LE),
            "counts": counts_LE,
        }
        return TrainState(state.step + 1, params, router_bias, opt_state), metrics

    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))


def updated_router_bias(router_bias, counts_LE: jax.Array, speed: jax.Array):
    """Moves every layer's bias by its own counts; layers are in `counts_LE`'s order: main, MTP.

    `counts_LE` must be sums over the whole global batch of the step (spec §3).
    """
    leaves, treedef = jax.tree.flatten(router_bias)  # "moe_blocks" sorts before "mtp"
    assert sum(len(leaf) for leaf in leaves) == len(counts_LE), (treedef, counts_LE.shape)
    updated, start = [], 0
    for bias_LE in leaves:
        updated.append(update_bias(bias_LE, counts_LE[start : start + len(bias_LE)], speed))
        start += len(bias_LE)
    return jax.tree.unflatten(treedef, updated)


def make_eval_step(graphdef: nnx.GraphDef) -> Callable[..., jax.Array]:
    """Compiles `eval_step(params, router_bias, batch) -> loss`, main model only, nothing updated.

    `batch` holds "tokens" [B, T+1] int32 (and "segments").
    """

    def eval_step(params, router_bias, batch):
        return evaluation_loss(nnx.merge(graphdef, params, router_bias), batch)

    return jax.jit(eval_step)

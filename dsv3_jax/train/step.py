"""One optimizer step: accumulate micro-batches, clip, AdamW, then the router bias."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import Config
from dsv3_jax.model.router import max_violation, update_bias
from dsv3_jax.parallel.mesh import overlap_options
from dsv3_jax.precision.fp8_weight import quantize_weights, with_masters
from dsv3_jax.precision.policy import fp8_recipe
from dsv3_jax.train.guards import NO_LIMITS
from dsv3_jax.train.losses import Losses, evaluation_loss, model_losses
from dsv3_jax.train.optim import adamw, clip_by_global_norm, leaf_norms
from dsv3_jax.train.pipeline import pipeline_gradients
from dsv3_jax.train.recheck import leaf_checksums
from dsv3_jax.train.state import TrainState

Metrics = dict[str, Any]


def make_train_step(
    config: Config, graphdef: nnx.GraphDef, shardings: TrainState, loss: Callable = model_losses
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Compiles `step(state, batch, learning_rate, bias_speed, mtp_weight, limits=NO_LIMITS)`.

    It returns `(state, metrics)`. A step whose loss or gradient norm is not finite or exceeds
    `limits` [2] is skipped: only the count of steps changes, and `accepted` is false (guards.py).

    `batch` holds "tokens" [A, B, T+1] int32 (and "segments"): A micro-batches of B sequences. The
    state is donated. Metrics are float32 on device: `loss` (main), `loss_mtp`, `loss_balance`,
    `grad_norm` before clipping and `leaf_norms` [leaves], `max_violation` per MoE layer, `counts`
    [layers, E]; with `guard.recheck_interval` also `leaf_checksums` (recheck.py).

    `loss` is called as `model_losses` is, of a micro-batch; fields of its result that `Losses` does
    not have are means over the micro-batches, reported as `extra`. A pipeline has its own.
    """
    optimizer = adamw(config.optim, jnp.dtype(config.precision.moments))
    recipe = fp8_recipe(config.precision)
    # Gradients go straight to the shard whose optimizer state needs them (ZeRO-1: reduce-scatter).
    gradient_shardings = shardings.opt_state.mean

    def gradients(state, quantized, mtp_weight, batch):
        def total_loss(params):
            params = with_masters(quantized, params)
            model = nnx.merge(graphdef, params, state.router_bias)
            losses, counts_LE = loss(model, batch, config.balance, mtp_weight)
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

    def through_pipeline(state, mtp_weight, batches):
        gradients_of = pipeline_gradients(config, shardings.params)
        grads, *rest = gradients_of(state.params, state.router_bias, batches, mtp_weight)
        return jax.lax.with_sharding_constraint(grads, gradient_shardings), *rest

    sum_of_gradients = accumulated if config.parallel.pipe == 1 else through_pipeline

    def train_step(state, batches, learning_rate, bias_speed, mtp_weight, limits=NO_LIMITS):
        num_microbatches = len(batches["tokens"])
        grads, losses, counts_LE = sum_of_gradients(state, mtp_weight, batches)
        grads, losses = jax.tree.map(lambda x: x / num_microbatches, (grads, losses))
        unclipped = grads
        grads, grad_norm = clip_by_global_norm(grads, config.optim.clip_norm)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, learning_rate=learning_rate
        )
        params = optax.apply_updates(state.params, updates)
        router_bias = state.router_bias
        if config.balance.method == "loss_free":  # once a step, after the optimizer (spec §3)
            router_bias = updated_router_bias(router_bias, counts_LE, bias_speed)
        # A rehearsal and a step with lost rows did not happen: not even the count changes.
        happened = (limits[0] > -jnp.inf) & (losses.overflow == 0)
        finite = jnp.isfinite(losses.total) & jnp.isfinite(grad_norm)
        accepted = happened & finite & (losses.main <= limits[0]) & (grad_norm <= limits[1])
        new_state = TrainState(
            state.step + happened,
            *kept_unless(
                accepted,
                (params, router_bias, opt_state),
                (state.params, state.router_bias, state.opt_state),
            ),
        )
        metrics = {
            "loss": losses.main,
            "loss_mtp": losses.mtp,
            "loss_balance": losses.balance,
            "grad_norm": grad_norm,
            "max_violation": max_violation(counts_LE),
            "counts": counts_LE,
            "overflow": losses.overflow,
            "accepted": accepted,
            "leaf_norms": leaf_norms(unclipped),
            "extra": {k: v for k, v in losses._asdict().items() if k not in Losses._fields},
        }
        if config.guard.recheck_interval:
            metrics["leaf_checksums"] = leaf_checksums(unclipped)
        return new_state, metrics

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=overlap_options(shardings.step.mesh) or None,
    )


def kept_unless(accepted: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays of an accepted step, the old ones of another, with every bit."""
    return jax.tree.map(partial(jnp.where, accepted), new, old)


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

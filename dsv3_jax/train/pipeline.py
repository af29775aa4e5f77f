"""Gradients of a whole step through the pipeline: what the scan executor gives, by another route.

The model is cut into an entry (embedding, dense blocks), its MoE layers, and an exit (final norm,
head, MTP modules and their losses). The executor knows none of them; here they are put together
from the model's own parts, and gradients come back in the parameters' tree and order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import Config
from dsv3_jax.model.block import remat
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import BATCH_AXES
from dsv3_jax.parallel.pipeline.executor import Model, Sums, Weights, run_table
from dsv3_jax.parallel.pipeline.partition import moe_layers_of_stages
from dsv3_jax.parallel.pipeline.schedules import make_schedule
from dsv3_jax.parallel.pipeline.stages import AXIS, Stages
from dsv3_jax.parallel.pipeline.tables import Table, build_table
from dsv3_jax.train.losses import Losses, balance_loss, input_segments, num_targets, token_losses

LAYERS = "moe_blocks"
ENTRY = ("embed", "dense_blocks")
EXIT = ("embed", "final_norm", "head", "mtp")  # the MTP modules embed the tokens ahead
_ALL_AXES = (AXIS, *BATCH_AXES)


def pipeline_table(config: Config, num_microbatches: int) -> tuple[Table, Stages]:
    """The table of a step and the layers of every rank.

    Raises:
      UserError: the schedule cannot run so many ranks, micro-batches or layers.
    """
    parallel = config.parallel
    schedule = make_schedule(parallel.schedule, parallel.pipe, num_microbatches)
    moe_layers = moe_layers_of_stages(config.model, schedule.num_stages)
    table = build_table(schedule, max_deferred=parallel.max_deferred)
    return table, Stages.build(moe_layers, table.stage_of)


def pipeline_gradients(
    config: Config, shardings: Any
) -> Callable[..., tuple[Any, Losses, jax.Array]]:
    """Makes `gradients(params, router_bias, batches, mtp_weight) -> (grads, losses, counts_LE)`.

    Args:
      shardings: of the parameters, NamedShardings that `rules.weight_sharding` made.

    Returns:
      A function whose results are sums over the micro-batches of `batches`, [A, B, T+1].
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    parts = _ModelParts.build(config, mesh)

    def gradients(params, router_bias, batches, mtp_weight):
        table, stages = pipeline_table(config, len(batches["tokens"]))
        own = _OnShard(config, mesh, parts, shardings, table, stages)
        rows = jax.tree.map(lambda _: P(None, BATCH_AXES), batches)
        partial_grads, losses, counts_LE = jax.shard_map(
            own.run,
            mesh=mesh,
            in_specs=(own.weight_specs(), P(), rows, P(), P()),
            out_specs=(own.gradient_specs(), P(), P()),
            check_vma=False,
        )(params, router_bias, batches, jax.vmap(num_targets)(batches), mtp_weight)
        # Summed out here, so that XLA may reduce and scatter at once.
        grads = jax.tree.map(lambda grad: jnp.sum(grad, axis=0), partial_grads)
        return grads, losses, counts_LE

    return gradients


@dataclass(frozen=True, kw_only=True)
class _ModelParts:
    """The model's parts as functions of their parameters, for one device's tokens."""

    config: Config
    runtime: Runtime
    graphdef: nnx.GraphDef
    params: dict[str, Any]  # shapes
    bias: Any
    block: nnx.GraphDef
    num_shards: int

    @classmethod
    def build(cls, config: Config, mesh: Mesh) -> "_ModelParts":
        runtime = Runtime.from_config(config, None, shard_of=mesh)
        model = nnx.eval_shape(
            lambda: DeepSeekV3(config.model, runtime=runtime, rngs=nnx.Rngs(config.run.seed))
        )
        graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
        return cls(
            config=config,
            runtime=runtime,
            graphdef=graphdef,
            params=nnx.to_pure_dict(params),
            bias=nnx.to_pure_dict(bias),
            block=nnx.split(model.moe_blocks, nnx.Param, RouterBias)[0],
            num_shards=mesh.shape["data"] * mesh.shape["expert"],
        )

    def model(self, params: dict[str, Any], bias: Any) -> DeepSeekV3:
        """With these weights alone; the others are shapes, not to be used."""
        return nnx.merge(self.graphdef, self.params | params, self.bias | bias)

    def layer(self, params, constants, x_BTD):
        context, bias = constants

        def run(params, bias, context, x_BTD):
            return nnx.merge(self.block, params, bias)(x_BTD, **context._asdict())

        run = remat(run, self.runtime, in_scan=True)
        y_BTD, stats = run(params, bias, context, x_BTD)
        return (y_BTD, balance_loss(stats, self.config.balance)), (stats.counts_E, stats.overflow)

    def entry(self, params, constants, _):
        model = self.model(params, {})
        embedding_BTD = model.embedded(constants["batch"]["tokens"][:, :-1])
        # What a scan would cast in its body, the executor casts once a step.
        return model.dense_layers_unrolled(embedding_BTD, constants["context"]), ()

    def exit(self, params, constants, x_BTD):
        """This device's share of the losses, and what is reported of them."""
        model, batch = self.model(params, constants["bias"]), constants["batch"]
        embedding_BTD = model.embedded(batch["tokens"][:, :-1])
        main_BTD, mtp_hidden, stats = model.last_states(x_BTD, embedding_BTD, constants["context"])
        main, mtp = token_losses(model, main_BTD, mtp_hidden, batch, constants["count"])
        balance = overflow = jnp.zeros((), jnp.float32)
        counts_LE = jnp.zeros((0, self.config.model.num_experts), jnp.float32)
        if stats is not None:
            balance = balance_loss(stats, self.config.balance) / self.num_shards
            counts_LE, overflow = stats.counts_E, jnp.sum(stats.overflow)
        total = main + constants["mtp_weight"] * mtp + balance
        return total, (main, mtp, balance, overflow, counts_LE)


class _OnShard:
    """What one device does in a step, inside `shard_map`, and how its arrays are laid out."""

    def __init__(self, config, mesh: Mesh, parts: _ModelParts, shardings, table, stages):
        self.config, self.mesh, self.parts = config, mesh, parts
        self.shardings, self.table, self.stages = shardings, table, stages

    def run(self, params, router_bias, batches, counts_A, mtp_weight):
        split_dims = self._split_dims()
        weights = Weights(
            layers=jax.tree.map(self.stages.to_stages, params[LAYERS], split_dims),
            entry=_select(params, ENTRY),
            exit=_select(params, EXIT),
        )
        sums = self._sums(weights, router_bias, batches, counts_A, mtp_weight)
        layers = jax.tree.map(self.stages.to_layers, sums.layers, split_dims)
        grads = sums.ends | {LAYERS: layers}
        losses, counts_LE = self._reports(sums, mtp_weight)
        return jax.tree.map(lambda grad: grad[None], grads), losses, counts_LE

    def _sums(self, weights: Weights, router_bias, batches, counts_A, mtp_weight) -> Sums:
        parts, shape = self.parts, batches["tokens"].shape
        # A rank's part of the selection bias, [S, L, E].
        layer_bias = jax.tree.map(lambda b: self.stages.to_stages(b, None), router_bias[LAYERS])
        any_model = parts.model({}, {})

        def batch_of(microbatch):
            return jax.tree.map(lambda x: x[microbatch], batches)

        def context_of(microbatch):
            segments_BT = input_segments(batch_of(microbatch))
            return any_model.block_context(shape[-1] - 1, segments_BT)

        def end_constants(microbatch):
            return {
                "batch": batch_of(microbatch),
                "context": context_of(microbatch),
                "count": counts_A[microbatch],
                "mtp_weight": mtp_weight,
                "bias": {name: bias for name, bias in router_bias.items() if name != LAYERS},
            }

        model = Model(
            entry=parts.entry,
            layer=parts.layer,
            exit=parts.exit,
            constants=context_of,
            layer_constants=lambda slot, layer: jax.tree.map(lambda b: b[slot, layer], layer_bias),
            end_constants=end_constants,
            loss_weight=1 / parts.num_shards,
        )
        x_like = jax.ShapeDtypeStruct(
            (shape[1], shape[2] - 1, self.config.model.width), parts.runtime.compute_dtype
        )
        return run_table(self.table, self.stages.num_layers, model, weights, x_like)

    def _reports(self, sums: Sums, mtp_weight) -> tuple[Losses, jax.Array]:
        counts, overflow = sums.layer_statistics
        main, mtp, mtp_balance, mtp_overflow, mtp_counts = sums.exit_statistics
        balance = sums.layer_loss / self.parts.num_shards + mtp_balance
        overflow = jnp.sum(overflow) + mtp_overflow
        main, mtp, balance, overflow, mtp_counts = jax.lax.psum(
            (main, mtp, balance, overflow, mtp_counts), _ALL_AXES
        )
        counts_LE = self.stages.to_layers(jax.lax.psum(counts, BATCH_AXES), None)
        counts_LE = jnp.concatenate([counts_LE, mtp_counts])
        return Losses(main + mtp_weight * mtp + balance, main, mtp, balance, overflow), counts_LE

    def weight_specs(self) -> dict[str, Any]:
        """Layers as they are split over `pipe` and `expert`; entry and exit over `expert` alone."""
        names = {name for name in (*ENTRY, *EXIT) if name in self.shardings}
        specs = {name: _specs(self.shardings[name], ("expert",)) for name in names}
        return specs | {LAYERS: _specs(self.shardings[LAYERS], (AXIS, "expert"))}

    def gradient_specs(self) -> dict[str, Any]:
        """As the weights, with a leading dim of the devices whose gradients are to be added."""

        def partial_sum(spec: P, axes: tuple[str, ...]) -> P:
            return P(tuple(axis for axis in axes if axis not in spec), *spec)

        def with_sums(specs, axes):
            return jax.tree.map(lambda spec: partial_sum(spec, axes), specs)

        return {
            name: with_sums(specs, BATCH_AXES if name == LAYERS else _ALL_AXES)
            for name, specs in self.weight_specs().items()
        }

    def _split_dims(self):
        """The dim of every layer weight that is split over `pipe`; None: none is."""
        specs = _specs(self.shardings[LAYERS], (AXIS,))
        return jax.tree.map(lambda spec: spec.index(AXIS) if AXIS in spec else None, specs)


def _select(tree: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: tree[name] for name in names if name in tree}


def _specs(shardings: Any, axes: tuple[str, ...]) -> Any:
    """The shardings' specs over these mesh axes alone.

    A dim split over several axes is one that a layout shards to save memory: it comes back whole.
    """

    def kept(entry):
        names = (entry,) if isinstance(entry, str) else entry or ()
        return names[0] if len(names) == 1 and names[0] in axes else None

    def of(sharding: NamedSharding) -> P:
        return P(*map(kept, sharding.spec))

    return jax.tree.map(of, shardings)

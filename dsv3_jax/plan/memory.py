"""Bytes a device needs for a run: the state to the byte, the rest by the buffers of its layers.

The estimate is of what the compiler plans at its peak, which is inside the loop over layers or,
where that is more, at the loss. `buffers.py` has the layers; here is what multiplies them.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from dsv3_jax.config import Config, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.parallel.pipeline.partition import moe_layers_of_stages
from dsv3_jax.parallel.rules import optimizer_sharding, weight_sharding
from dsv3_jax.plan.buffers import ITEMSIZE, LayerBytes, dense_layer, moe_layer
from dsv3_jax.plan.parameters import weights
from dsv3_jax.precision.policy import is_fp8
from dsv3_jax.train.losses import LOGITS_BUDGET

FRACTION = 0.9  # of a device's memory; the rest is for the runtime, collectives and fragmentation


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on the fullest device."""

    parameters: int  # float32 masters and router biases, as the layout shards them
    gradients: int  # float32: a pipeline's whole, else one micro-batch's and their sum, reduced
    moments: int  # AdamW m and v, ZeRO-1 shards
    copies: int  # weights for as long as a step: FP8 codes in both layouts, a pipeline's stages
    activations: int  # kept for the backward pass of live micro-batches, by recomputation policy
    queue: int  # what the weight gradients that a pipeline puts off will need
    experts: int  # all-to-all buffers and experts' slots of the chunks at work
    working: int  # other values and gradients of the chunks at work
    head: int  # at the loss: logits, gradients of the head; less the room that layers at work had

    @property
    def total(self) -> int:
        return sum(getattr(self, item.name) for item in fields(self))

    def fits(self, hbm_bytes: int) -> bool:
        """Whether the total stays under `FRACTION` of a device's memory."""
        return self.total < FRACTION * hbm_bytes

    def largest(self, count: int) -> list[tuple[str, int]]:
        """The categories that need most: (name, bytes)."""
        sizes = [(item.name, getattr(self, item.name)) for item in fields(self)]
        return sorted(sizes, key=lambda entry: -entry[1])[:count]


CATEGORIES: Mapping[str, str] = MappingProxyType(
    {
        "parameters": "parameters",
        "gradients": "gradients",
        "moments": "moments",
        "copies": "weights in use",
        "activations": "activations",
        "queue": "queued weight gradients",
        "experts": "all-to-all and expert buffers",
        "working": "layer at work",
        "head": "logits and head",
    }
)


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Buffers that a schedule's table gives a rank, in micro-batches of one stage."""

    residuals: int
    queue: int
    ring: int  # activations and gradients that come from other ranks
    stages: int  # of a rank
    num_stages: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "Slots":
        """As `pipeline/tables.py` counts them, without making the table."""
        ranks, most = parallel.pipe, parallel.max_deferred
        residuals, queue, ring, stages, num_stages = {
            "dualpipe": (ranks + 1, ranks // 2, 6, 2, ranks),
            "dualpipev": (2 * ranks + 1, ranks, 6, 2, 2 * ranks),
            "zb1p": (ranks + (most is not None), ranks, 4, 1, ranks),
            "1f1b": (ranks, 0, 4, 1, ranks),
        }[parallel.schedule]
        return cls(
            residuals=residuals,
            queue=queue if most is None else min(queue, most),
            ring=ring,
            stages=stages,
            num_stages=num_stages,
        )


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Numbers on a device, by what becomes of them."""

    parameters: int
    used: int  # trained, that a device computes with
    moments: int  # trained, on the shards of the optimizer
    codes: int  # of `used` and not trained ones, those that FP8 keeps as codes
    whole_layer: int  # of one MoE layer, put together from its shards over all but `expert`
    staged: int  # that a pipeline's rank computes with; the float32 embedding counts twice


@functools.lru_cache(maxsize=512)
def _weights(
    model: ModelConfig, mesh_axes: tuple[int, int, int, int], layout: str, rank_layers: int
) -> _Weights:
    """Counts them.

    Args:
      mesh_axes: sizes of pipe, data, context and expert.
      rank_layers: of MoE layers on a pipeline's rank, all its stages as full as the fullest.
    """
    pipe, data, context, expert = mesh_axes
    mesh = abstract_mesh(ParallelConfig(pipe=pipe, data=data, context=context, expert=expert))
    parameters = used = moments = codes = whole_layer = staged = 0
    for weight in weights(model):
        sharding = weight_sharding(mesh, weight.shape, weight.axes, layout)
        shard = math.prod(sharding.shard_shape(weight.shape))
        whole = weight.size // (expert if "expert" in weight.axes else 1)
        in_layer = weight.path.startswith("moe_blocks.")
        if in_layer:
            whole_layer += whole // weight.shape[0]
        own = shard
        if pipe > 1:
            own = whole // weight.shape[0] * rank_layers if in_layer else whole
        parameters += shard
        if is_fp8(tuple(weight.path.split("."))):
            codes += own
        # Rows are looked up in the float32 table; everything else is cast once a step.
        staged += own * (2 if weight.path == "embed.table" else 1)
        if weight.trained:
            used += own
            moments += math.prod(
                optimizer_sharding(sharding, weight.shape).shard_shape(weight.shape)
            )
    return _Weights(
        parameters=parameters,
        used=used,
        moments=moments,
        codes=codes,
        whole_layer=whole_layer,
        staged=staged,
    )


def device_memory(config: Config) -> MemoryEstimate:
    """Estimates what one device holds while training `config`, at the peak of a step.

    Parameters, gradients and moments follow the layout's shardings to the byte. Dispatch counts the
    buffers that are allocated, whatever the routing. Within 15 % of what the compilers plan.
    """
    parallel, precision = config.parallel, config.precision
    num_microbatches = config.data.sequences_per_step // config.microbatch_sequences
    layer, slots, stage_layers = moe_layer(config), None, 0
    if parallel.pipe > 1:
        slots = Slots.of(parallel)
        stage_layers = max(1, *moe_layers_of_stages(config.model, slots.num_stages))
    numbers = _weights(
        config.model,
        (parallel.pipe, parallel.data, parallel.context, parallel.expert),
        parallel.layout,
        rank_layers=slots.stages * stage_layers if slots else 0,
    )
    if slots is None:
        # Reduced layer by layer to the optimizer's shards, where micro-batches are summed.
        one_microbatch = 4 * numbers.moments
        gradients = one_microbatch * min(2, num_microbatches)
        copies = 2 * numbers.codes if precision.compute == "fp8" else 0
        activations, queue = _activations(config, layer), 0
    else:
        one_microbatch, gradients = 0, 4 * numbers.used
        copies = ITEMSIZE[precision.activations] * numbers.staged  # or two codes
        stream = _tokens(config) * config.model.width * ITEMSIZE[precision.activations]
        activations = slots.residuals * stage_layers * layer.kept + slots.ring * stream
        queue = slots.queue * stage_layers * layer.queued
    experts, working, head = _at_work(config, layer, numbers.whole_layer, one_microbatch)
    return MemoryEstimate(
        parameters=4 * numbers.parameters,
        gradients=gradients,
        moments=2 * ITEMSIZE[precision.moments] * numbers.moments,
        copies=copies,
        activations=round(activations),
        queue=round(queue),
        experts=round(experts),
        working=round(working),
        head=round(head),
    )


def _tokens(config: Config) -> int:
    """Of a micro-batch on a device."""
    shards = config.parallel.data * config.parallel.expert
    tokens = config.microbatch_sequences // shards * config.data.sequence_length
    return tokens // config.parallel.context


def _activations(config: Config, layer: LayerBytes) -> float:
    """Of one micro-batch in the whole model, MTP included."""
    model = config.model
    moe_layers = model.num_moe_layers + model.mtp_depth
    return model.num_dense_layers * dense_layer(config).kept + moe_layers * layer.kept


def _at_work(
    config: Config, layer: LayerBytes, whole_layer: int, gradients: int
) -> tuple[float, float, float]:
    """Rows, other values, and what the head adds: in the loop over layers or at the loss.

    A backward chunk has the layer's values, recomputed unless they were all kept, and as many
    gradients; a pipeline runs a forward chunk beside it. At the loss there are one MTP module and
    the head, whose gradient the loss makes in its forward pass, but no layer's weights.

    Args:
      whole_layer: numbers of a layer's weights.
      gradients: bytes of the weight gradients that the backward pass has yet to make.
    """
    model, precision = config.model, config.precision
    backward = 1 if precision.remat == "none" else 2
    sets = backward + (config.parallel.pipe > 1)
    unused_at_loss = sets - (backward if model.mtp_depth else 0)
    # A layer's weights are gathered in the compute dtype and give float32 gradients.
    gathered = 0 if config.parallel.pipe > 1 else ITEMSIZE[precision.activations]
    layer_weights = whole_layer * (4 + gathered)
    room = unused_at_loss * (layer.values + layer.rows) + layer_weights + gradients
    head = 4 * model.vocab_size * model.width * (1 + model.mtp_depth)
    head += 2 * 4 * min(_tokens(config) * model.vocab_size, LOGITS_BUDGET)
    return sets * layer.rows, sets * layer.values + layer_weights, max(0.0, head - room)

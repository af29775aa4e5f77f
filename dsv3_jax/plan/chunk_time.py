"""Times of the chunks F, B and W of a pipeline stage on a chip.

Compute is FLOPs over a share of the peak; dispatch and combine come from `network.py`. An
overlapped pair hides them as published: each runs beside the other chunk's compute (spec §6.1).
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.parallel.pipeline.partition import moe_layers_of_stages
from dsv3_jax.parallel.pipeline.schedules import Schedule
from dsv3_jax.parallel.pipeline.simulate import Costs
from dsv3_jax.plan import network
from dsv3_jax.plan.buffers import ITEMSIZE
from dsv3_jax.plan.chips import Chip
from dsv3_jax.plan.parameters import count_parameters
from dsv3_jax.plan.weight_traffic import gather_seconds


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What cannot be derived. Shares of a peak count the work between the products too.

    FP8 and attention are calibrated on kernels, not on a step: DeepSeek's published profile of one
    layer (spec §6.1), where the GEMMs of MLP F, B and W and of attention W, 11.3 TFLOP, take 17.3
    ms on 112 of 132 SMs, and attention F 4.4 ms. The share for BF16 is our choice.
    """

    fp8: float = 0.33  # of the FP8 peak
    bf16: float = 0.5  # of the BF16 peak; the head always, everything without FP8
    attention: float = 0.33  # of the BF16 peak, for q k^T and p v
    # Dispatch moves whole buffers and ticks end together, as our one SPMD program does. False: rows
    # in use alone, cross nodes once, and ranks run freely, as in DeepSeek's system.
    spmd: bool = True


OUR_SYSTEM = Assumptions()
PUBLISHED_SYSTEM = Assumptions(spmd=False)


@dataclass(frozen=True, kw_only=True)
class ChunkTimes:
    """Seconds of one micro-batch in one stage, or the mean of a rank's two."""

    forward: float
    backward: float  # input gradients, with what is recomputed
    weights: float
    overlapped: float  # a forward with a full backward chunk
    all_to_all: float  # dispatches and combines of one forward and one backward
    exposed: float  # of those, what an overlapped pair does not hide

    @property
    def costs(self) -> Costs:
        """As the simulator wants them: B is the full backward."""
        return Costs(
            forward=self.forward,
            backward=self.backward + self.weights,
            weights=self.weights,
            overlapped=self.overlapped,
        )


class _Part(NamedTuple):
    """Compute seconds of half a layer, by chunk."""

    forward: float
    backward: float
    weights: float


class _Layer(NamedTuple):
    attention: _Part
    mlp: _Part
    recomputed: float  # seconds of forward work done again in the backward chunk
    dispatch: float  # seconds of communication
    combine: float
    dispatched_again: float  # in the backward chunk, where rows are not kept


class _Stage(NamedTuple):
    """Number of layers of each kind."""

    dense: int
    moe: int
    is_last: bool


def chunk_times(
    config: Config, chip: Chip, assumptions: Assumptions, schedule: Schedule | None
) -> ChunkTimes:
    """Times on the busiest rank of the schedule; None: a device that holds every layer."""
    rate = _Rates.of(config, chip, assumptions)
    times = [
        [_stage_times(config, chip, rate, stage) for stage in stages]
        for stages in _stages_of_ranks(config.model, schedule)
    ]
    means = [_mean(of_rank) for of_rank in times]
    return max(means, key=lambda t: t.overlapped)


def _stages_of_ranks(model: ModelConfig, schedule: Schedule | None) -> list[list[_Stage]]:
    if schedule is None:
        return [[_Stage(model.num_dense_layers, model.num_moe_layers, is_last=True)]]
    counts = moe_layers_of_stages(model, schedule.num_stages)
    last = schedule.num_stages - 1
    return [
        [_Stage(model.num_dense_layers * (s == 0), counts[s], is_last=s == last) for s in stages]
        for stages in schedule.stage_of.tolist()
    ]


def _mean(times: list[ChunkTimes]) -> ChunkTimes:
    names = [item.name for item in dataclasses.fields(ChunkTimes)]
    return ChunkTimes(**{n: sum(getattr(t, n) for t in times) / len(times) for n in names})


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """FLOP/s of the products, and `Assumptions.spmd`."""

    linear: float
    bf16: float
    attention: float
    spmd: bool

    @classmethod
    def of(cls, config: Config, chip: Chip, assumptions: Assumptions) -> "_Rates":
        bf16 = assumptions.bf16 * chip.bf16_flops
        fp8 = max(bf16, assumptions.fp8 * chip.fp8_flops)  # without FP8 units: converted to BF16
        return cls(
            linear=fp8 if config.precision.compute == "fp8" else bf16,
            bf16=bf16,
            attention=assumptions.attention * chip.bf16_flops,
            spmd=assumptions.spmd,
        )


def _tokens_of_microbatch(config: Config) -> float:
    parallel = config.parallel
    tokens = config.microbatch_sequences * config.data.sequence_length
    return tokens / (parallel.data * parallel.context * parallel.expert)


def _attention(config: Config, chip: Chip, rate: _Rates) -> _Part:
    """Causal; the flash backward does five products where the forward does two."""
    model, tokens = config.model, _tokens_of_microbatch(config)
    linear = 2 * count_parameters(model).mla * tokens / rate.linear
    widths = model.num_heads * (model.qk_head_dim + model.v_head_dim)
    core = 2 * widths * config.data.sequence_length / 2 * tokens / rate.attention
    # Split sequences: keys of other devices are formed here too, in the backward pass once more.
    keys = model.kv_latent_dim * model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)
    others = 2 * keys * (config.parallel.context - 1) * tokens / rate.linear
    gather = _gather_seconds(config, chip)
    return _Part(
        forward=linear + core + others + gather,
        backward=linear + 2.5 * core + 2 * others + 2 * gather,
        weights=linear + others,
    )


def _gather_seconds(config: Config, chip: Chip) -> float:
    """Of a layer's latents over `context`; as long when their gradients are reduced."""
    model, parallel = config.model, config.parallel
    numbers = (model.kv_latent_dim + model.qk_rope_head_dim) * _tokens_of_microbatch(config)
    received = numbers * (parallel.context - 1) * ITEMSIZE[config.precision.activations]
    if chip.torus_dims:
        return received / chip.link_bandwidth
    in_node = parallel.context * parallel.expert <= chip.devices_per_node
    return received / (chip.in_node_bandwidth if in_node else chip.between_node_bandwidth)


def _mlp(parameters: float, tokens: float, rate: float) -> _Part:
    seconds = 2 * parameters * tokens / rate
    return _Part(seconds, seconds, seconds)


def _layer(config: Config, chip: Chip, rate: _Rates, *, moe: bool) -> _Layer:
    model, tokens = config.model, _tokens_of_microbatch(config)
    counts, policy = count_parameters(model), config.precision.remat
    attention = _attention(config, chip, rate)
    if moe:
        active = counts.shared_experts + model.experts_per_token * counts.expert + counts.router
        dispatch, combine = _exchanges(config, chip, rate)
    else:
        active, dispatch, combine = counts.dense_ffn, 0.0, 0.0
    mlp = _mlp(active, tokens, rate.linear)
    # 'paper' makes queries, keys and values again from the latents (spec §5.5).
    queries = (model.q_latent_dim or model.width) * model.num_heads * model.qk_head_dim
    keys = model.kv_latent_dim * model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)
    recomputed = {
        "none": 0.0,
        "paper": 2 * (queries + keys) * tokens / rate.linear,
        "full": attention.forward + mlp.forward,
    }[policy]
    again = dispatch if policy == "full" else 0.0
    return _Layer(attention, mlp, recomputed, dispatch, combine, again)


def _exchanges(config: Config, chip: Chip, rate: _Rates) -> tuple[float, float]:
    """Seconds of a dispatch and of a combine; those of the backward are as long (spec §5.6)."""
    model, parallel = config.model, config.parallel
    devices = parallel.expert
    if devices == 1:
        return 0.0, 0.0
    shape = network.node_shape(chip, devices)
    hierarchical = parallel.dispatch == "hierarchical" and shape[0] > 1
    if not rate.spmd and shape[0] > 1:
        rows = network.rows_two_hop(model, *shape)
    elif not rate.spmd or parallel.dispatch == "ragged":
        rows = network.rows_one_hop(model, *shape)
    else:
        rows = network.rows_padded(model, *shape, parallel.buffer_factor, hierarchical)
    itemsize = ITEMSIZE[config.precision.activations]
    tokens = round(_tokens_of_microbatch(config))
    fp8 = config.precision.compute == "fp8"
    return tuple(
        network.exchange_seconds(chip, devices, rows, tokens, row)
        for row in (
            network.row_bytes(model.width, fp8=fp8, itemsize=itemsize),
            network.row_bytes(model.width, fp8=False, itemsize=itemsize),
        )
    )


def _exposed(layer: _Layer) -> float:
    """Communication that an overlapped pair waits for, each beside its compute (spec §6.1)."""
    attention, mlp = layer.attention, layer.mlp
    beside = (
        (layer.dispatch, attention.weights + attention.forward),  # backward of combine
        (layer.dispatch + layer.dispatched_again, mlp.backward + layer.recomputed),
        (layer.combine, mlp.weights + mlp.forward),  # backward of dispatch
        (layer.combine, attention.backward),
    )
    return sum(max(0.0, transfer - compute) for transfer, compute in beside)


def _stage_times(config: Config, chip: Chip, rate: _Rates, stage: _Stage) -> ChunkTimes:
    model, tokens = config.model, _tokens_of_microbatch(config)
    counts, modules = count_parameters(model), model.mtp_depth * stage.is_last
    layers = [_layer(config, chip, rate, moe=False)] * stage.dense
    layers += [_layer(config, chip, rate, moe=True)] * (stage.moe + modules)
    ends = counts.head * (1 + modules) + counts.mtp_projection * modules if stage.is_last else 0
    head = _mlp(ends, tokens, rate.bf16).forward  # as long in F, B and W
    one_way = sum(layer.dispatch + layer.combine for layer in layers)
    again = sum(layer.dispatched_again for layer in layers)
    forward = head + sum(layer.attention.forward + layer.mlp.forward for layer in layers)
    backward = head + sum(
        layer.attention.backward + layer.mlp.backward + layer.recomputed for layer in layers
    )
    weights = head + sum(layer.attention.weights + layer.mlp.weights for layer in layers)
    exposed = sum(map(_exposed, layers))
    # A chunk alone hands its result on before the next rank can start.
    handed_on = _handed_on_seconds(config, chip)
    gather = gather_seconds(config, chip)
    return ChunkTimes(
        forward=max(forward, gather) + one_way + handed_on,
        backward=max(backward, 2 * gather) + one_way + again + handed_on,
        weights=weights,
        overlapped=forward + backward + weights + exposed,
        all_to_all=2 * one_way + again,
        exposed=exposed,
    )


def _handed_on_seconds(config: Config, chip: Chip) -> float:
    """Of a chunk's activations to the next rank; ranks are taken to be in different nodes."""
    if config.parallel.pipe == 1:
        return 0.0
    sent = _tokens_of_microbatch(config) * config.model.width
    bandwidth = chip.link_bandwidth if chip.torus_dims else chip.between_node_bandwidth
    return sent * ITEMSIZE[config.precision.activations] / bandwidth

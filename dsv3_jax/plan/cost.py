"""What a training step takes, and a run costs: from measured phases, or predicted for a chip.

The phases of a step are those of the table DeepSeek published for V3 on 2,048 H800 (spec §12).
`pipeline_time` makes them from the times of chunks and a schedule, `predict` the times of chunks
from a config, a chip and the few `Assumptions`.
"""

import dataclasses
import functools
from dataclasses import dataclass, fields

from dsv3_jax.config import Config
from dsv3_jax.parallel.pipeline.placement import place
from dsv3_jax.parallel.pipeline.schedules import Schedule, limit_deferred, make_schedule
from dsv3_jax.parallel.pipeline.simulate import Costs, lockstep_makespan, simulate
from dsv3_jax.plan.chips import Chip
from dsv3_jax.plan.chunk_time import OUR_SYSTEM, Assumptions, ChunkTimes, chunk_times
from dsv3_jax.plan.flops import flops_per_token
from dsv3_jax.plan.weight_traffic import optimizer_seconds

_DAY, _HOUR = 86400.0, 3600.0


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of the phases of a step, the mean over pipeline ranks; they add up to the step."""

    forward: float  # 1F: forward chunks that run alone
    backward: float  # 1B: input gradients that run alone
    weights: float  # 1W: weight gradients that run alone, of full backward chunks too
    overlapped: float  # 1F1B: a forward and a full backward chunk together
    bubble: float
    optimizer: float  # gradient reduction and update
    # What one SPMD program adds, since a tick lasts as long as its busiest rank; below zero where
    # its ticks overlap chunks that the schedule runs one after the other.
    lockstep: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(getattr(self, item.name) for item in fields(self))


# HW T4 (spec §12), multi-plane and multi-rail network. The six phases are the whole step: they add
# up to 19.90 and 19.94 s where the same table gives 19.926 and 19.946, so no other term is missing.
MEASURED_V3 = StepTime(
    forward=1.13, bubble=2.06, backward=1.99, weights=0.48, overlapped=13.95, optimizer=0.29
)
MEASURED_V3_MULTI_RAIL = StepTime(
    forward=1.13, bubble=2.03, backward=1.99, weights=0.48, overlapped=14.00, optimizer=0.31
)


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What steps of one length make of a run. The batch ramp's shorter steps are left out."""

    step_seconds: float
    tokens_per_step: int
    num_devices: int
    dollars_per_hour: float = 2.0  # of one device, as DeepSeek reckoned (spec §12)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * _DAY

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_day

    def device_hours(self, tokens: float) -> float:
        """E.g. 180K for 1e12 tokens of V3's published steps."""
        return tokens / self.tokens_per_second / _HOUR * self.num_devices

    def dollars(self, tokens: float) -> float:
        return self.device_hours(tokens) * self.dollars_per_hour


def pipeline_time(schedule: Schedule, costs: Costs) -> StepTime:
    """Phases of a step whose ranks run freely, as `simulate` plays them; no optimizer."""
    alone = dict.fromkeys(("F", "B", "W"), 0.0)
    overlapped = 0.0
    for program in schedule.programs:
        for step in program:
            kinds = [op.kind for op in step]
            if len(kinds) == 2:
                overlapped += costs.of(kinds)
            elif kinds == ["B"]:
                alone["B"] += costs.backward - costs.weights
                alone["W"] += costs.weights
            else:
                alone["B" if kinds == ["Bi"] else kinds[0]] += costs.of(kinds)
    idle = simulate(schedule, costs).idle
    ranks = schedule.ranks
    return StepTime(
        forward=alone["F"] / ranks,
        backward=alone["B"] / ranks,
        weights=alone["W"] / ranks,
        overlapped=overlapped / ranks,
        bubble=sum(idle) / ranks,
        optimizer=0.0,
    )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A predicted step of `config` on a chip, and what it was made from."""

    step: StepTime
    chunk: ChunkTimes  # of the busiest rank
    cost: RunCost
    chip_flops: float  # BF16 peak of a device, what MFU is relative to (spec §12)
    flops_per_token: float  # causal, MTP excluded, as published

    @property
    def model_flops_utilization(self) -> float:
        """Causal MFU."""
        rate = self.flops_per_token * self.cost.tokens_per_second
        return rate / self.cost.num_devices / self.chip_flops


def predict(
    config: Config,
    chip: Chip,
    assumptions: Assumptions = OUR_SYSTEM,
    *,
    dollars_per_hour: float = 2.0,
) -> Prediction:
    """Predicts a step of the full batch.

    The ranks are taken to be as busy as the busiest one. Experts are balanced, no device is slow
    and nothing fails. For V3's published run and system it gives 18.1 s where 19.9 was measured:
    1F 1.11 (1.13), 1F1B 13.9 (13.95), 1B and 1W 2.1 (2.5), optimizer 0.23 (0.29), but a bubble of
    0.8 where 2.06 was measured, since ranks that wait for each other lose more than the schedule.

    Raises:
      UserError: the schedule cannot run so many ranks, micro-batches or layers.
    """
    parallel = config.parallel
    num_microbatches = config.data.sequences_per_step // config.microbatch_sequences
    if parallel.pipe == 1:
        chunk = chunk_times(config, chip, assumptions, None)
        step = StepTime(
            forward=num_microbatches * chunk.forward,
            backward=num_microbatches * chunk.backward,
            weights=num_microbatches * chunk.weights,
            overlapped=0.0,
            bubble=0.0,
            optimizer=0.0,
        )
    else:
        schedule = _schedule(
            parallel.schedule, parallel.pipe, num_microbatches, parallel.max_deferred
        )
        chunk = chunk_times(config, chip, assumptions, schedule)
        step = pipeline_time(schedule, chunk.costs)
        if assumptions.spmd:
            kinds = _tick_kinds(
                parallel.schedule, parallel.pipe, num_microbatches, parallel.max_deferred
            )
            waits = lockstep_makespan(kinds, chunk.costs) - step.seconds
            step = dataclasses.replace(step, lockstep=waits)
    step = dataclasses.replace(step, optimizer=optimizer_seconds(config, chip))
    return Prediction(
        step=step,
        chunk=chunk,
        cost=RunCost(
            step_seconds=step.seconds,
            tokens_per_step=config.tokens_per_step,
            num_devices=parallel.num_devices,
            dollars_per_hour=dollars_per_hour,
        ),
        chip_flops=chip.bf16_flops,
        flops_per_token=flops_per_token(config.model, config.data.sequence_length),
    )


@functools.lru_cache(maxsize=64)
def _schedule(name: str, ranks: int, microbatches: int, max_deferred: int | None) -> Schedule:
    schedule = make_schedule(name, ranks, microbatches)
    return schedule if max_deferred is None else limit_deferred(schedule, max_deferred)


@functools.lru_cache(maxsize=64)
def _tick_kinds(
    name: str, ranks: int, microbatches: int, max_deferred: int | None
) -> list[list[tuple[str, ...]]]:
    """Kinds of the chunks [ticks][ranks] of the executor's table."""
    cells = place(_schedule(name, ranks, microbatches, max_deferred))
    return [[cell.kinds for cell in row] for row in cells]

"""Plans for a number of devices: the meshes, schedules and policies that fit, fastest first."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3_jax.config import Config
from dsv3_jax.parallel.pipeline.schedules import SCHEDULES, Schedule, make_schedule
from dsv3_jax.plan import topology
from dsv3_jax.plan.chunk_time import OUR_SYSTEM, chunk_times
from dsv3_jax.plan.cost import Prediction, pipeline_time, predict
from dsv3_jax.plan.memory import MemoryEstimate, device_memory
from dsv3_jax.plan.topology import Topology, meshes, with_mesh

_SEQUENCES = (1, 2, 4)  # of a micro-batch on a device
_REMAT = ("none", "paper", "full")
# From what runs fastest, or loses no row, to what takes least memory: the first that fits counts.
_MAX_DEFERRED = (None, 1, 0)
_BUFFER_FACTORS = (2.0, 1.5, 1.25)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration that fits, and its predicted step."""

    config: Config
    memory: MemoryEstimate
    prediction: Prediction


def predict_step(config: Config, where: Topology) -> Prediction:
    """The one place where plans get their step time."""
    return predict(config, where.chip)


def search(config: Config, where: Topology, count: int = 10) -> list[Plan]:
    """The plans with the most predicted tokens a second, best first.

    Varied are mesh, schedule, micro-batch, recomputation and layout; all else is as in `config`,
    but where it does not fit fewer weight gradients wait and, at last, rows get less room. Plans
    are predicted in the order of a bound, a step in which ranks run freely, until no other can be
    better.
    """
    fitting = [(_least_seconds(c, where), c, memory) for c, memory in _fitting(config, where)]
    best: list[Plan] = []
    for bound, found, memory in sorted(fitting, key=lambda entry: entry[0]):
        if len(best) == count and bound >= best[-1].prediction.step.seconds:
            break
        plan = Plan(config=found, memory=memory, prediction=predict_step(found, where))
        best = sorted([*best, plan], key=lambda p: p.prediction.step.seconds)[:count]
    return best


def _fitting(config: Config, where: Topology) -> Iterator[tuple[Config, MemoryEstimate]]:
    for mesh in meshes(config, where.num_devices):
        variants = (
            [{"schedule": name} for name in SCHEDULES]
            if mesh[0] > 1
            else [{"layout": "zero1_ep"}, {"layout": "fsdp_ep"}]
        )
        for variant, sequences in itertools.product(variants, _SEQUENCES):
            base = with_mesh(config, *mesh, sequences=sequences, max_deferred=None, **variant)
            for remat in _REMAT if base else ():
                precision = dataclasses.replace(base.precision, remat=remat)
                found = _roomiest(dataclasses.replace(base, precision=precision), where)
                if found is not None:
                    yield found


def _roomiest(config: Config, where: Topology) -> tuple[Config, MemoryEstimate] | None:
    """With the most queued gradients and the most room for rows that fit; None: nothing fits."""
    parallel = config.parallel
    queues = parallel.pipe > 1 and parallel.schedule != "1f1b"
    bounded = parallel.expert > 1 and parallel.dispatch != "ragged"
    most = parallel.buffer_factor or _BUFFER_FACTORS[0]  # whole buffers travel: more is slower
    factors = sorted({most, *(f for f in _BUFFER_FACTORS[:2] if f < most)}, reverse=True)
    for factor in factors if bounded else (None,):
        for max_deferred in _MAX_DEFERRED if queues else (None,):
            candidate = dataclasses.replace(
                config,
                parallel=dataclasses.replace(
                    parallel, max_deferred=max_deferred, buffer_factor=factor
                ),
            )
            memory = device_memory(candidate)
            if memory.fits(where.chip.hbm_bytes):
                return candidate, memory
    return None


def _least_seconds(config: Config, where: Topology) -> float:
    """Of a step whose ranks run freely and may queue all weight gradients, optimizer left out."""
    parallel = config.parallel
    num_microbatches = config.data.sequences_per_step // config.microbatch_sequences
    if parallel.pipe == 1:
        chunk = chunk_times(config, where.chip, OUR_SYSTEM, None)
        return num_microbatches * (chunk.forward + chunk.backward + chunk.weights)
    # The shortest step, and for every further micro-batch the chunks that the busiest rank adds.
    shortest = _shortest(parallel.schedule, parallel.pipe)
    chunk = chunk_times(config, where.chip, OUR_SYSTEM, shortest)
    seconds = chunk.forward + chunk.backward + chunk.weights
    if any(len(step) == 2 for step in shortest.programs[0]):
        seconds = min(seconds, chunk.overlapped)
    further = (num_microbatches - shortest.microbatches) * shortest.num_stages / shortest.ranks
    return pipeline_time(shortest, chunk.costs).seconds + further * seconds


@functools.lru_cache(maxsize=64)
def _shortest(name: str, ranks: int) -> Schedule:
    return make_schedule(name, ranks, 2 * ranks if name.startswith("dualpipe") else ranks)


def knobs(
    config: Config, where: Topology, count: int = 5
) -> list[tuple[list[str], MemoryEstimate]]:
    """Changes of one key, or of the mesh, that need less memory: (what to set, then), best first.

    Changes that fit come first, the least frugal one of them at the top: it costs least speed.
    """
    now = device_memory(config)
    found: dict[tuple[str, ...], MemoryEstimate] = {}
    for candidate in _single_changes(config):
        sets = tuple(topology.changes(config, candidate))
        memory = device_memory(candidate)
        if sets and memory.total < 0.99 * now.total:
            found[sets] = memory

    def order(entry: tuple[tuple[str, ...], MemoryEstimate]) -> tuple[bool, int]:
        fits = entry[1].fits(where.chip.hbm_bytes)
        return not fits, -entry[1].total if fits else entry[1].total

    return [(list(sets), memory) for sets, memory in sorted(found.items(), key=order)[:count]]


def _single_changes(config: Config) -> Iterator[Config]:
    parallel = config.parallel
    mesh = parallel.pipe, parallel.data, parallel.expert
    sequences = config.microbatch_sequences // (parallel.data * parallel.expert)
    queue = 0 if parallel.max_deferred is None else parallel.max_deferred
    variants = [dict(schedule=name) for name in SCHEDULES if parallel.pipe > 1]
    variants += [dict(layout="fsdp_ep")]
    variants += [dict(max_deferred=n) for n in (1, 0) if n < queue or parallel.max_deferred is None]
    variants += [
        dict(buffer_factor=f) for f in _BUFFER_FACTORS if f < (parallel.buffer_factor or 9)
    ]
    candidates = [with_mesh(config, *mesh, **variant) for variant in variants]
    candidates += [with_mesh(config, *mesh, sequences=n) for n in _SEQUENCES if n < sequences]
    pipe, data, expert = mesh
    for other in ((pipe * 2, data, expert), (pipe, data, expert * 2)):
        if data % 2 == 0:
            candidates.append(with_mesh(config, other[0], data // 2, other[2]))
    yield from filter(None, candidates)
    changed = [("remat", r) for r in _REMAT[_REMAT.index(config.precision.remat) + 1 :]]
    changed += [("moments", "bfloat16"), ("compute", "fp8")]
    for name, value in changed:
        yield dataclasses.replace(
            config, precision=dataclasses.replace(config.precision, **{name: value})
        )

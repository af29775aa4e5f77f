"""Plays a schedule with given chunk costs: makespan, idle time, memory; and the formulas (§6.4).

The simulator is asynchronous and without latency: a rank starts its next step as soon as it is free
and the step's inputs exist anywhere. What one SPMD program adds, since its ticks end together, is
`lockstep_makespan`.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

from dsv3_jax.parallel.pipeline.schedules import Op, Schedule, Step


@dataclasses.dataclass(frozen=True)
class Costs:
    """Times of a chunk, in any unit. The default is spec §6.4's case where its formulas are exact.

    Attributes:
      forward: F.
      backward: B, the full backward; input gradients alone cost `backward - weights`.
      weights: W.
      overlapped: F&B, a forward and a full backward chunk that hide each other's communication.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    overlapped: float = 3.0

    def of(self, kinds: Iterable[str]) -> float:
        """Time of chunks that run together: a forward overlaps with a backward, W with nothing.

        Overlap saves the same time whether the backward chunk is full or not: W communicates
        nothing, so it has nothing to hide.
        """
        counts = Counter(kinds)
        alone = {
            "F": self.forward,
            "B": self.backward,
            "Bi": self.backward - self.weights,
            "W": self.weights,
        }
        saved = self.forward + self.backward - self.overlapped
        pairs = min(counts["F"], counts["B"] + counts["Bi"])
        return sum(alone[kind] * n for kind, n in counts.items()) - pairs * saved


UNIT_COSTS = Costs()


@dataclasses.dataclass(frozen=True)
class Simulation:
    """Times of every step; `starts` and `ends` are laid out as `Schedule.programs`."""

    starts: tuple[tuple[float, ...], ...]
    ends: tuple[tuple[float, ...], ...]
    makespan: float
    idle: tuple[float, ...]  # of every rank: makespan less its own work

    @property
    def bubble(self) -> float:
        """The largest idle time of a rank, spec §6.4's bubble."""
        return max(self.idle)


def simulate(schedule: Schedule, costs: Costs = UNIT_COSTS) -> Simulation:
    """Plays the programs asynchronously.

    Raises:
      ValueError: the programs wait for each other in a circle.
    """
    ranks, done = range(schedule.ranks), {}
    starts: list[list[float]] = [[] for _ in ranks]
    ends: list[list[float]] = [[] for _ in ranks]
    moved = True
    while moved:
        moved = False
        for rank in ranks:
            program = schedule.programs[rank]
            while len(ends[rank]) < len(program):
                step = program[len(ends[rank])]
                needed = inputs(schedule, rank, step)
                if any(value not in done for value in needed):
                    break
                free = ends[rank][-1] if ends[rank] else 0.0
                start = max([free, *(done[value] for value in needed)])
                end = start + costs.of(op.kind for op in step)
                starts[rank].append(start)
                ends[rank].append(end)
                done.update((output(schedule, rank, op), end) for op in step)
                moved = True
    stuck = [r for r in ranks if len(ends[r]) < len(schedule.programs[r])]
    if stuck:
        raise ValueError(f"{schedule.name}: ranks {stuck} wait for each other")
    makespan = max(end[-1] for end in ends)
    work = [sum(costs.of(op.kind for op in step) for step in p) for p in schedule.programs]
    return Simulation(
        tuple(map(tuple, starts)), tuple(map(tuple, ends)), makespan,
        tuple(makespan - w for w in work),
    )  # fmt: skip


Value = tuple[str, int, int]  # ("F" | "B" | "W", stage, global micro-batch): that chunk's result


def output(schedule: Schedule, rank: int, op: Op) -> Value:
    """The name of what `op` makes: activation, input gradient or weight gradient."""
    kind = "B" if op.kind == "Bi" else op.kind
    stage = int(schedule.stage_of[rank, op.direction])
    return kind, stage, schedule.global_microbatch(op)


def inputs(schedule: Schedule, rank: int, step: Step) -> list[Value]:
    """The names of what `step` waits for."""
    needed = []
    for op in step:
        kind, stage, microbatch = output(schedule, rank, op)
        if kind == "F" and stage > 0:
            needed.append(("F", stage - 1, microbatch))
        elif kind == "B":  # the last stage makes its own gradient, from the loss
            last = stage == schedule.num_stages - 1
            needed.append(("F", stage, microbatch) if last else ("B", stage + 1, microbatch))
        elif kind == "W":
            needed.append(("B", stage, microbatch))
    return needed


def bubble_formula(schedule: Schedule, costs: Costs = UNIT_COSTS) -> float:
    """Idle time of a rank by spec §6.4; exact where F = B - W = W and F&B = F + B."""
    stages, c = schedule.num_stages, costs
    if schedule.name == "1f1b":
        return (stages - 1) * (c.forward + c.backward)
    if schedule.name == "zb1p":
        return (stages - 1) * (c.forward + c.backward - 2 * c.weights)
    return (stages / 2 - 1) * (c.overlapped + c.backward - 3 * c.weights)


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Most chunks of a rank whose forward is done and whose backward is not (spec §6.4: P + 1)."""
    return tuple(_peak(program, {"F": 1, "B": -1, "Bi": -1}) for program in schedule.programs)


def peak_deferred(schedule: Schedule) -> tuple[int, ...]:
    """Most weight gradients of a rank that are queued."""
    return tuple(_peak(program, {"Bi": 1, "W": -1}) for program in schedule.programs)


def lockstep_makespan(ticks: Sequence[Sequence[Iterable[str]]], costs: Costs = UNIT_COSTS) -> float:
    """Makespan where every tick lasts as long as its busiest rank.

    Args:
      ticks: the kinds of the chunks of every rank in every tick, `Table.kinds()`.
    """
    return sum(max(costs.of(kinds) for kinds in tick) for tick in ticks)


def _peak(program: Sequence[Step], change: dict[str, int]) -> int:
    """Largest running sum; a forward overlapped with a backward holds its memory beside it."""
    now = peak = 0
    for step in program:
        for op in sorted(step, key=lambda op: -change.get(op.kind, 0)):
            now += change.get(op.kind, 0)
            peak = max(peak, now)
    return peak

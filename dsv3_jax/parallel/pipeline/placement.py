"""Which chunks run in which tick: a schedule in lock-step.

In one SPMD program a tick ends with the exchange between neighbours, so it lasts as long as its
busiest rank, and a chunk can use only what its neighbours sent at the end of an earlier tick. A
tick of a rank holds at most one forward, one backward and one queued weight-gradient chunk.
"""

import dataclasses

import numpy as np

from dsv3_jax.parallel.pipeline.schedules import Op, Schedule
from dsv3_jax.parallel.pipeline.simulate import (
    UNIT_COSTS,
    Costs,
    Value,
    inputs,
    lockstep_makespan,
    output,
    peak_deferred,
)

ROUNDING = 1e-9  # of sums of costs


@dataclasses.dataclass(frozen=True)
class Cell:
    """The work of one rank in one tick; a backward of kind Bi queues its weight gradients."""

    forward: Op | None = None
    backward: Op | None = None
    weights: Op | None = None

    @property
    def ops(self) -> tuple[Op, ...]:
        return tuple(op for op in (self.forward, self.backward, self.weights) if op)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(op.kind for op in self.ops)

    def with_op(self, op: Op) -> "Cell | None":
        """This cell with one more chunk, or None when it has no room for it."""
        if op.kind == "F":
            return None if self.forward else dataclasses.replace(self, forward=op)
        if op.kind != "W":
            return None if self.backward else dataclasses.replace(self, backward=op)
        if self.backward == dataclasses.replace(op, kind="Bi"):  # queued and popped: a full one
            return dataclasses.replace(self, backward=dataclasses.replace(op, kind="B"))
        return None if self.weights else dataclasses.replace(self, weights=op)


def place(schedule: Schedule, costs: Costs = UNIT_COSTS) -> list[list[Cell]]:
    """Cells [ticks][ranks]: every rank's program in its own order, packed into ticks.

    A tick is as long as the next step of some rank, and every rank packs as many of its next steps
    into it as fit. Of two rules for that length the one with the shorter makespan is used: the
    longest next step, or the one that leaves the most idle rank with the least idle time so far.
    The second wins back most of what lock-step costs DualPipe beyond 8 stages; 1F1B wants the
    first.

    Raises:
      ValueError: the programs wait for each other in a circle.
    """
    candidates = [_place(schedule, costs, spare_idle) for spare_idle in (True, False)]
    return min(
        candidates,
        key=lambda ticks: lockstep_makespan([[c.kinds for c in row] for row in ticks], costs),
    )


def _place(schedule: Schedule, costs: Costs, spare_idle: bool) -> list[list[Cell]]:
    ranks = range(schedule.ranks)
    packers = [_Packer(schedule, rank) for rank in ranks]
    done: set[Value] = set()
    idle = np.zeros(schedule.ranks)
    ticks = []
    while any(packer.left for packer in packers):
        cells = [packer.growing_cells(done) for packer in packers]
        times = [[costs.of(cell.kinds) for cell in growing] for growing in cells]
        lengths = {growing[0] for growing in times if growing}
        if not lengths:
            raise ValueError(f"{schedule.name}: the ranks wait for each other")
        options = []
        for length in lengths if spare_idle else {max(lengths)}:
            steps = [sum(time <= length + ROUNDING for time in growing) for growing in times]
            work = np.array([times[rank][n - 1] if n else 0.0 for rank, n in enumerate(steps)])
            after = idle + work.max() - work
            options.append(((after.max(), after.sum(), length), steps, after))
        _, steps, idle = min(options, key=lambda option: option[0])
        row = [cells[rank][n - 1] if n else Cell() for rank, n in enumerate(steps)]
        for packer, cell, n in zip(packers, row, steps, strict=True):
            packer.take(cell, n)
            done.update(output(schedule, packer.rank, op) for op in cell.ops if op.kind != "W")
        ticks.append(row)
    return ticks


class _Packer:
    """One rank's program, and how far it is."""

    def __init__(self, schedule: Schedule, rank: int):
        self.rank, self._schedule = rank, schedule
        self._program, self._at = schedule.programs[rank], 0
        self._queued, self._most_queued = 0, max(peak_deferred(schedule))

    @property
    def left(self) -> int:
        return len(self._program) - self._at

    def growing_cells(self, done: set[Value]) -> list[Cell]:
        """The cells with 1, 2, ... of the next steps, as many as can start in this tick."""
        cells, cell = [], Cell()
        for step in self._program[self._at :]:
            for op in step:
                # A queued chunk needs what its own rank made, perhaps in this very tick.
                needed = () if op.kind == "W" else inputs(self._schedule, self.rank, (op,))
                cell = cell.with_op(op) if done.issuperset(needed) else None
                if cell is None:
                    return cells
            if self._queued + cell.kinds.count("Bi") > self._most_queued:
                return cells  # the slot that this tick's W leaves is free from the next tick on
            cells.append(cell)
        return cells

    def take(self, cell: Cell, steps: int) -> None:
        self._at += steps
        self._queued += cell.kinds.count("Bi") - cell.kinds.count("W")

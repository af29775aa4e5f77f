"""The integer table that the pipeline executor scans over: one row a tick, one column a rank.

It names, for every tick and rank, the chunks to run and the buffer slots they read and write, so
that the executor knows no schedule: any `Schedule` becomes a `Table`, and a new one needs no code.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from dsv3_jax.parallel.pipeline.placement import Cell, place
from dsv3_jax.parallel.pipeline.replay import check_table as check_table
from dsv3_jax.parallel.pipeline.schedules import Op, Schedule, limit_deferred

TICK_COLUMNS = (
    "f_slot", "f_microbatch", "f_input", "f_residual", "f_exit",
    "b_slot", "b_microbatch", "b_input", "b_residual", "b_weights", "b_entry",
    "w_slot", "w_microbatch", "w_residual", "w_weights",
)  # fmt: skip
ACTIVATION_COLUMNS = ("a_left", "a_right", "a_own")
GRADIENT_COLUMNS = ("g_left", "g_right", "g_own")


@dataclasses.dataclass(frozen=True, eq=False)
class Table:
    """A schedule for the executor. `columns` are int32 [ticks, ranks]; -1 means none.

    A tick runs, in this order: the forward of stage `f_slot`, the backward of `b_slot`, the queued
    weight gradients of `w_slot`, then the exchange with the neighbours. A forward of slot 0 sends
    right and one of slot 1 left; backward the other way round.

    Columns of the forward: f_slot; f_microbatch, counted over all directions; f_input, activation
      slot read (-1 on the first stage, which embeds); f_residual, residual slot written; f_exit,
      gradient slot that the loss's gradient is written to (-1 except on the last stage).
    Columns of the backward: b_slot; b_microbatch; b_input, gradient slot read; b_residual, read;
      b_weights, queue slot written for a later W (-1: the weight gradients are made at once);
      b_entry, 1 on the first stage, whose gradient goes on to the embedding, else 0.
    Columns of the queued weight gradients: w_slot; w_microbatch; w_residual and w_weights, read.
    Columns of the exchange: a_left, a_right, a_own, activation slot that receives what the left or
      right neighbour's or the rank's own forward sent in this tick; g_left, g_right, g_own,
      gradient slot likewise. Nothing arrives: the trash slot, num_activation_slots or
      num_gradient_slots.

    Sizes are the most that any rank needs, and at least 1. What a schedule never does (`has_...`)
    the executor need not compile.
    """

    name: str
    ranks: int
    ticks: int
    num_microbatches: int
    slots_per_rank: int
    num_stages: int
    stage_of: np.ndarray  # int32 [ranks, slots_per_rank]
    num_activation_slots: int
    num_gradient_slots: int
    num_residual_slots: int
    num_weight_slots: int
    has_pairs: bool  # a forward and a full backward in one tick
    has_full_backward: bool  # one that makes its weight gradients at once
    has_queue: bool  # weight gradients for later
    columns: dict[str, np.ndarray]

    def kinds(self) -> list[list[tuple[str, ...]]]:
        """Kinds of the chunks [ticks][ranks], for `simulate.lockstep_makespan`."""
        c = self.columns
        return [
            [
                ("F",) * bool(c["f_slot"][t, r] >= 0)
                + (("Bi" if c["b_weights"][t, r] >= 0 else "B"),) * bool(c["b_slot"][t, r] >= 0)
                + ("W",) * bool(c["w_slot"][t, r] >= 0)
                for r in range(self.ranks)
            ]
            for t in range(self.ticks)
        ]


def build_table(schedule: Schedule, *, max_deferred: int | None = None) -> Table:
    """Places the schedule's chunks in ticks and gives every value a slot.

    Args:
      max_deferred: most weight-gradient chunks that a rank queues; beyond it a backward chunk makes
        its weight gradients at once. None: as many as the schedule likes.
    """
    if max_deferred is not None:
        schedule = limit_deferred(schedule, max_deferred)
    cells = place(schedule)
    writers = [_RankWriter(schedule, rank, len(cells)) for rank in range(schedule.ranks)]
    for tick, row in enumerate(cells):
        for writer, cell in zip(writers, row, strict=True):
            writer.run(tick, cell)
        for rank, cell in enumerate(row):
            for column, to, stage, op in _sent(schedule, rank, cell):
                writers[to].receive(tick, column, stage, schedule.global_microbatch(op))
    sizes = {
        name: max(1, *(writer.pools[name].size for writer in writers))
        for name in ("activation", "gradient", "residual", "weight")
    }
    columns = {
        name: np.stack([writer.columns[name] for writer in writers], axis=1)
        for name in writers[0].columns
    }
    for names, pool in ((ACTIVATION_COLUMNS, "activation"), (GRADIENT_COLUMNS, "gradient")):
        for name in names:
            columns[name] = np.where(columns[name] < 0, np.int32(sizes[pool]), columns[name])
    is_backward, is_later = columns["b_slot"] >= 0, columns["b_weights"] >= 0
    return Table(
        has_pairs=bool((is_backward & ~is_later & (columns["f_slot"] >= 0)).any()),
        has_full_backward=bool((is_backward & ~is_later).any()),
        has_queue=bool(is_later.any()),
        name=schedule.name,
        ranks=schedule.ranks,
        ticks=len(cells),
        num_microbatches=schedule.microbatches,
        slots_per_rank=schedule.directions,
        num_stages=schedule.num_stages,
        stage_of=schedule.stage_of,
        columns=columns,
        **{f"num_{pool}_slots": size for pool, size in sizes.items()},
    )


def _sent(schedule: Schedule, rank: int, cell: Cell) -> Iterator[tuple[str, int, int, Op]]:
    """(receiving column, receiving rank, stage that uses it, chunk) of all that a cell sends."""
    for letter, op, step in (("a", cell.forward, 1), ("g", cell.backward, -1)):
        if op is None:
            continue
        stage = int(schedule.stage_of[rank, op.direction]) + step
        if not 0 <= stage < schedule.num_stages:
            continue
        to = rank + (step if op.direction == 0 else -step)
        if 0 <= to < schedule.ranks:
            yield f"{letter}_{'left' if to > rank else 'right'}", to, stage, op
        else:  # the turn of dualpipev: the rank's other stage goes on
            yield f"{letter}_own", rank, stage, op


class _Pool:
    """Slots of one buffer of one rank, by the value they hold; the lowest free slot comes next."""

    def __init__(self):
        self.size = 0
        self._slot: dict[tuple[int, int], int] = {}
        self._ending: list[tuple[int, int]] = []

    def hold(self, value: tuple[int, int]) -> int:
        taken = set(self._slot.values())
        slot = next(n for n in range(len(taken) + 1) if n not in taken)
        self.size = max(self.size, slot + 1)
        self._slot[value] = slot
        return slot

    def read(self, value: tuple[int, int], *, last: bool = True) -> int:
        """The value's slot; free from `end_tick` on when this read is the last."""
        if last:
            self._ending.append(value)
        return self._slot[value]

    def end_tick(self) -> None:
        for value in self._ending:
            del self._slot[value]
        self._ending.clear()


class _RankWriter:
    """One rank's columns, written tick by tick. Values are named (stage, micro-batch)."""

    def __init__(self, schedule: Schedule, rank: int, ticks: int):
        self._schedule, self._rank = schedule, rank
        names = TICK_COLUMNS + ACTIVATION_COLUMNS + GRADIENT_COLUMNS
        self.columns = {name: np.full(ticks, -1, np.int32) for name in names}
        self.columns["b_entry"][:] = 0
        self.pools = {n: _Pool() for n in ("activation", "gradient", "residual", "weight")}

    def run(self, tick: int, cell: Cell) -> None:
        """Writes the chunks of a tick. What they read stays held until the tick's work is over."""
        put = functools.partial(self._put, tick)
        activation, gradient, residual, weight = self.pools.values()
        if op := cell.backward:
            value, deferred = self._value(op), op.kind == "Bi"
            put("b", op, input=gradient.read(value), entry=int(value[0] == 0))
            put("b", op, residual=residual.read(value, last=not deferred))
            put("b", op, weights=weight.hold(value) if deferred else -1)
        if op := cell.weights:
            value = self._value(op)
            put("w", op, residual=residual.read(value), weights=weight.read(value))
        if op := cell.forward:
            value = self._value(op)
            last = value[0] == self._schedule.num_stages - 1
            put("f", op, input=activation.read(value) if value[0] > 0 else -1)
            put("f", op, residual=residual.hold(value), exit=gradient.hold(value) if last else -1)
        for pool in self.pools.values():  # what arrives at the end of this tick may use them again
            pool.end_tick()

    def receive(self, tick: int, column: str, stage: int, microbatch: int) -> None:
        pool = self.pools["activation" if column.startswith("a_") else "gradient"]
        self.columns[column][tick] = pool.hold((stage, microbatch))

    def _value(self, op: Op) -> tuple[int, int]:
        stage = int(self._schedule.stage_of[self._rank, op.direction])
        return stage, self._schedule.global_microbatch(op)

    def _put(self, tick: int, letter: str, op: Op, **entries: int) -> None:
        entries |= {"slot": op.direction, "microbatch": self._schedule.global_microbatch(op)}
        for name, entry in entries.items():
            self.columns[f"{letter}_{name}"][tick] = entry

"""Pipeline schedules as data: the published order of chunks on every rank (spec §6).

A rank's program is a sequence of steps; a step is one chunk, or a forward and a backward chunk that
overlap. Nothing here knows about time: `simulate.py` plays a program with any chunk costs, and
`tables.py` turns it into the integer table that the executor runs.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from dsv3_jax.errors import UserError, did_you_mean

Kind = Literal["F", "B", "Bi", "W"]


@dataclasses.dataclass(frozen=True)
class Op:
    """One chunk: all layers of one stage for one micro-batch.

    Attributes:
      kind: F forward, B full backward, Bi backward to the input alone, W its weight gradients.
      direction: which of the rank's two stages; dualpipe: the end where the micro-batch enters.
      microbatch: number within its direction, from 0.
    """

    kind: Kind
    direction: int
    microbatch: int


Step = tuple[Op, ...]  # one chunk, or an overlapped (forward, backward)
Program = tuple[Step, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Every rank's program; `microbatches` counts those of all directions together."""

    name: str
    ranks: int
    microbatches: int
    programs: tuple[Program, ...]

    @property
    def directions(self) -> int:
        """Stages a rank holds; also the number of directions that `Op.direction` counts."""
        return 2 if self.name in ("dualpipe", "dualpipev") else 1

    @property
    def num_stages(self) -> int:
        return 2 * self.ranks if self.name == "dualpipev" else self.ranks

    @functools.cached_property
    def stage_of(self) -> np.ndarray:
        """Stage that a rank runs in a direction, int32 [ranks, directions] (spec §6.2, §6.5)."""
        ranks = np.arange(self.ranks, dtype=np.int32)
        return np.stack([ranks, self.num_stages - 1 - ranks][: self.directions], axis=1)

    def global_microbatch(self, op: Op) -> int:
        """Index among all micro-batches: dualpipe's direction 1 comes after direction 0."""
        first = self.microbatches // 2 if self.name == "dualpipe" else 0
        return op.direction * first + op.microbatch


class _Writer:
    """Writes one rank's program: numbers the micro-batches and queues weight gradients, FIFO."""

    def __init__(self, swap: bool = False):
        self.steps: list[Step] = []
        self._swap = swap  # phases to directions: the second half of dualpipe's ranks is mirrored
        self._next: dict[tuple[str, int], int] = {}
        self._queue: deque[tuple[int, int]] = deque()

    def forward(self, phase: int = 0) -> None:
        self.steps.append((self._op("F", phase),))

    def backward(self, phase: int = 0, *, split: bool = False) -> None:
        self.steps.append((self._op("Bi" if split else "B", phase),))

    def forward_backward(self, forward_phase: int, backward_phase: int) -> None:
        self.steps.append((self._op("F", forward_phase), self._op("B", backward_phase)))

    def weights(self) -> None:
        self.steps.append((Op("W", *self._queue.popleft()),))

    def _op(self, kind: Kind, phase: int) -> Op:
        direction = 1 - phase if self._swap else phase
        key = ("F" if kind == "F" else "B", direction)
        microbatch = self._next.get(key, 0)
        self._next[key] = microbatch + 1
        if kind == "Bi":
            self._queue.append((direction, microbatch))
        return Op(kind, direction, microbatch)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """DualPipe (spec §6.3): two copies of every stage, micro-batches entering at both ends.

    Raises:
      UserError: odd `ranks`, odd `microbatches`, or fewer than 2 * ranks of them.
    """
    if ranks < 2 or ranks % 2:
        nearest = [n for n in (ranks - 1, ranks + 1) if n >= 2] or [2]
        raise UserError(
            f"parallel.pipe={ranks}: dualpipe pairs the ranks, so their number is even; "
            f"use {' or '.join(map(str, nearest))}"
        )
    _at_least("dualpipe", ranks, microbatches, 2 * ranks, "2 a rank")
    if microbatches % 2:
        raise UserError(
            f"{microbatches} micro-batches: dualpipe feeds half of them from each end, so their "
            f"number is even; use {microbatches - 1} or {microbatches + 1}"
        )
    half = ranks // 2
    programs = []
    for rank in range(ranks):
        inner = min(rank, ranks - 1 - rank)
        programs.append(_eight_steps(inner, half, microbatches // 2 - ranks, swap=rank >= half))
    return Schedule("dualpipe", ranks, microbatches, tuple(programs))


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """DualPipeV (spec §6.5): the stages go down the ranks and come back up; no second copy.

    Raises:
      UserError: fewer than 2 * ranks micro-batches.
    """
    _at_least("dualpipev", ranks, microbatches, 2 * ranks, "2 a rank")
    programs = [
        _eight_steps(rank, ranks, microbatches - 2 * ranks, swap=False) for rank in range(ranks)
    ]
    return Schedule("dualpipev", ranks, microbatches, tuple(programs))


def zb1p(ranks: int, microbatches: int) -> Schedule:
    """ZB1P, the ZB-H1 order of zero-bubble pipelines: 1F1B whose weight gradients wait.

    Rank r keeps r weight gradients queued, as many as it has fewer live chunks than rank 0, so the
    peak memory is that of 1F1B while the bubble shrinks to (P-1)(F+B-2W) (spec §6.4).

    Raises:
      UserError: fewer micro-batches than ranks.
    """
    _at_least("zb1p", ranks, microbatches, ranks, "1 a rank")
    programs = []
    for rank in range(ranks):
        writer = _Writer()
        for number in _forwards_ahead(writer, ranks - 1 - rank, microbatches):
            writer.backward(split=True)
            if number >= rank:
                writer.weights()
        for _ in range(rank):
            writer.weights()
        programs.append(tuple(writer.steps))
    return Schedule("zb1p", ranks, microbatches, tuple(programs))


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """1F1B: warm-up forwards, then one forward and one full backward in turn.

    Raises:
      UserError: fewer micro-batches than ranks.
    """
    _at_least("1f1b", ranks, microbatches, ranks, "1 a rank")
    programs = []
    for rank in range(ranks):
        writer = _Writer()
        for _ in _forwards_ahead(writer, ranks - 1 - rank, microbatches):
            writer.backward()
        programs.append(tuple(writer.steps))
    return Schedule("1f1b", ranks, microbatches, tuple(programs))


SCHEDULES = {"dualpipe": dualpipe, "dualpipev": dualpipev, "zb1p": zb1p, "1f1b": one_f_one_b}


def make_schedule(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule of a name; see `SCHEDULES`.

    Raises:
      UserError: no such name, or a number of ranks or micro-batches that the schedule cannot run.
    """
    if name not in SCHEDULES:
        raise UserError(
            f"parallel.schedule='{name}' is not one of {', '.join(SCHEDULES)};"
            f"{did_you_mean(name, SCHEDULES) or ' use dualpipe'}"
        )
    if ranks < 1:
        raise UserError(f"parallel.pipe={ranks} must be at least 1")
    return SCHEDULES[name](ranks, microbatches)


def limit_deferred(schedule: Schedule, most: int) -> Schedule:
    """The schedule with at most `most` queued weight gradients a rank, the memory knob of W.

    Where the queue is full, an input-only backward becomes a full one and its W disappears.
    """
    programs = []
    for program in schedule.programs:
        steps: list[Step] = []
        queued: set[tuple[int, int]] = set()
        for step in program:
            op = step[-1]  # Bi and W never overlap with another chunk
            chunk = (op.direction, op.microbatch)
            if op.kind == "Bi" and len(queued) < most:
                queued.add(chunk)
            elif op.kind == "Bi":
                step = (dataclasses.replace(op, kind="B"),)
            elif op.kind == "W" and chunk not in queued:
                continue
            elif op.kind == "W":
                queued.remove(chunk)
            steps.append(step)
        programs.append(tuple(steps))
    return dataclasses.replace(schedule, programs=tuple(programs))


def to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as `tools.pipeline_schedule --format=json` prints it."""
    return {
        "schedule": schedule.name,
        "ranks": schedule.ranks,
        "microbatches": schedule.microbatches,
        "programs": [
            [[dataclasses.asdict(op) for op in step] for step in program]
            for program in schedule.programs
        ],
    }


def _eight_steps(inner: int, half: int, extra: int, swap: bool) -> Program:
    """The eight steps of spec §6.3; §6.5 has the same with other counts.

    Args:
      inner: ranks between this one and the end where phase 0 enters.
      half: ranks from that end to the turn; the rank of inner half - 1 has the shortest bubble.
      extra: micro-batches of a direction beyond the 2 * half that fill the pipeline.
      swap: phase 0 is direction 1.
    """
    writer, outer = _Writer(swap), half - inner - 1
    for _ in range(2 * outer):  # step 1
        writer.forward(0)
    for _ in range(inner + 1):  # step 2
        writer.forward(0)
        writer.forward(1)
    for _ in range(outer):  # step 3
        writer.backward(1, split=True)
        writer.weights()
        writer.forward(1)
    for number in range(extra + inner + 1):  # step 4
        if number == 0 and outer == 0:
            writer.forward(0)  # not overlapped at the turn, where nothing waits: a smaller bubble
            writer.backward(1)
        else:
            writer.forward_backward(0, 1)
        writer.forward_backward(1, 0)
    for _ in range(outer):  # step 5
        writer.backward(1)
        writer.forward_backward(1, 0)
    first_split = inner + 1  # step 6: the last inner + 1 of its backward calls leave W for later
    for call in range(2 * (inner + 1)):
        writer.backward(1 - call % 2, split=call >= first_split)
    for _ in range(outer):  # step 7
        writer.weights()
        writer.backward(0, split=True)
    for _ in range(inner + 1):  # step 8
        writer.weights()
    return tuple(writer.steps)


def _forwards_ahead(writer: _Writer, warmup: int, microbatches: int) -> Iterator[int]:
    """Writes the forwards of 1F1B; yields every micro-batch where its backward comes."""
    for _ in range(warmup):
        writer.forward()
    for number in range(microbatches):
        if number < microbatches - warmup:
            writer.forward()
        yield number


def _at_least(name: str, ranks: int, microbatches: int, least: int, why: str) -> None:
    if microbatches < least:
        raise UserError(
            f"{microbatches} micro-batches are too few for parallel.schedule={name} with "
            f"parallel.pipe={ranks}: it needs {why}; use at least {least} micro-batches"
        )

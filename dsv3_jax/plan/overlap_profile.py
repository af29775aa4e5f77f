"""How much of the time that collectives took was hidden behind compute, from a profile.

Reads what `jax.profiler.trace(DIR)` leaves, the `*.xplane.pb` of every host: unlike the trace for
a browser beside it, this holds all events. A collective's time includes waiting for its peers.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.errors import UserError
from dsv3_jax.plan.overlap import scope_of

_COLLECTIVE = re.compile(
    r"(ragged-all-to-all|all-to-all|collective-permute|all-gather|all-reduce|reduce-scatter)\b"
)
_COLLECTIVE_KERNEL = re.compile(r"nccl|AllToAll", re.IGNORECASE)
# A TPU's events that are no compute: they contain others, or wait for a transfer.
_NO_OPERATION = re.compile(r"(while|conditional|call)\b|copy|.*-(start|done)\b")
_NO_KERNEL = re.compile(r"Memcpy|Memset")


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a device did."""

    name: str  # of the operation in the program if known, else of the kernel
    kernel: str
    scope: str
    start: float  # ns
    end: float
    is_collective: bool
    is_compute: bool

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """'all-to-all', 'collective-permute', ... of an operation's name; '' if it is another."""
    name = name.replace("_", "-").replace("ppermute", "collective-permute")
    found = _COLLECTIVE.match(name)
    return found.group(1).removeprefix("ragged-") if found else ""


@dataclass(frozen=True, kw_only=True)
class CollectiveTime:
    """One collective of the program, all its runs on all devices together."""

    name: str
    scope: str  # as `overlap.Transfer.scope`
    runs: int
    total_ns: float
    hidden_ns: float  # while the same device computed

    @property
    def hidden_share(self) -> float:
        return self.hidden_ns / self.total_ns if self.total_ns else 0.0


def device_events(directory: Path) -> list[list[Event]]:
    """What every device did, from the newest profile under a directory.

    Raises:
      UserError: it holds no profile, or one without an event of a GPU or TPU.
    """
    runs = sorted(path.parent for path in directory.glob("plugins/profile/*/*.xplane.pb"))
    if not runs:
        raise UserError(f"{directory} holds no profile; give the folder of jax.profiler.trace")
    devices = [
        events
        for path in sorted(runs[-1].glob("*.xplane.pb"))
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes
        if (events := _device_events(plane))
    ]
    if not devices:
        raise UserError(f"{runs[-1]} shows no GPU and no TPU; profile a run on one")
    return devices


def read_profile(directory: Path) -> list[CollectiveTime]:
    """Collectives of the newest profile under a directory, the longest first; raises as
    `device_events`."""
    return collective_times(device_events(directory))


def collective_times(devices: Sequence[Sequence[Event]]) -> list[CollectiveTime]:
    """Collectives of all devices, the longest first."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for events in devices:
        busy = _union([(e.start, e.end) for e in events if e.is_compute])
        for event in events:
            if event.is_collective:
                hidden = _covered(event.start, event.end, busy)
                found[event.name, event.scope].append((event.end - event.start, hidden))
    times = [
        CollectiveTime(
            name=name,
            scope=scope,
            runs=len(runs),
            total_ns=sum(total for total, _ in runs),
            hidden_ns=sum(hidden for _, hidden in runs),
        )
        for (name, scope), runs in found.items()
    ]
    return sorted(times, key=lambda time: -time.total_ns)


def busy_ns(events: Sequence[Event]) -> float:
    """Time in which a device did anything at all."""
    return float(np.diff(_union([(e.start, e.end) for e in events])).sum())


def _device_events(plane) -> list[Event]:
    if plane.name.startswith("/device:GPU:"):
        # Other lines repeat the kernels, summed up by module, operation and step.
        lines = (line for line in plane.lines if line.name.startswith("Stream"))
        return [_kernel(event) for line in lines for event in line.events]
    if plane.name.startswith("/device:TPU:"):
        lines = (line for line in plane.lines if line.name == "XLA Ops")
        return [event for line in lines for event in _operations(line)]
    return []


def _kernel(event) -> Event:
    stats = dict(event.stats)
    operation = str(stats.get("hlo_op", ""))
    is_collective = bool(_COLLECTIVE_KERNEL.search(event.name) or _COLLECTIVE.match(operation))
    return Event(
        name=operation or event.name.partition("(")[0],
        kernel=event.name,
        scope=_scope(stats),
        start=event.start_ns,
        end=event.start_ns + event.duration_ns,
        is_collective=is_collective,
        is_compute=not is_collective and not _NO_KERNEL.match(event.name),
    )


def _operations(line) -> Iterator[Event]:
    """Operations of a TPU core; a start and its end make one collective, with what lies between."""
    started: dict[str, float] = {}
    for event in sorted(line.events, key=lambda event: event.start_ns):
        name = event.name.removeprefix("%").split(" ")[0]
        end = event.start_ns + event.duration_ns
        is_collective = bool(_COLLECTIVE.match(name.replace("_", "-")))
        if is_collective and "-start" in name:
            started[name] = event.start_ns
            continue
        name = name.replace("-done", "-start")
        yield Event(
            name=name,
            kernel=name,
            scope=_scope(dict(event.stats)),
            start=started.pop(name, event.start_ns) if is_collective else event.start_ns,
            end=end,
            is_collective=is_collective,
            is_compute=not is_collective and not _NO_OPERATION.match(name),
        )


def _scope(stats: dict) -> str:
    return scope_of(str(stats.get("tf_op") or stats.get("name") or ""))


def _union(intervals: list[tuple[float, float]]) -> np.ndarray:
    """Disjoint intervals [n, 2] in order that cover the same time."""
    merged: list[list[float]] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    return np.array(merged, np.float64).reshape(-1, 2)


def _covered(start: float, end: float, disjoint: np.ndarray) -> float:
    first = np.searchsorted(disjoint[:, 1], start)
    last = np.searchsorted(disjoint[:, 0], end)
    inside = np.clip(disjoint[first:last], start, end)
    return float(np.sum(inside[:, 1] - inside[:, 0]))

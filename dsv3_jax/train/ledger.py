"""The goodput ledger: what every second of a run went into, over all its starts.

One clock that always runs for exactly one category, so that the parts of a process sum to its life.
A line is appended to WORKDIR/ledger.jsonl at most once a second with the totals so far: a process
that is killed leaves all but its last moment. What was lost and the time between two starts show
only when the next process starts, and are worked out when the file is read (`account`).
"""

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILE = "ledger.jsonl"
# In the order of a table. `USEFUL` is what the rest is for; only GRPO has rollouts and rewards.
# The last two are of `account`.
USEFUL = ("steps", "rollout", "reward")
CATEGORIES = (
    *USEFUL, "compile", "data", "evaluate", "save", "restore", "start", "end", "lost", "down",
)  # fmt: skip
_SECONDS_BETWEEN_LINES = 1.0


class Ledger:
    """The clock of one process; process 0 writes.

    It begins with 'start', at the birth of the process where the system tells.
    """

    def __init__(self, workdir: Path, writes: bool):
        self._path = workdir / FILE if writes else None
        self._born = _birth()
        self._totals: Counter[str] = Counter()
        self._category, self._since = "start", self._born
        self._written_at = 0.0
        self._first_step = self._step = 0

    def resumed(self, step: int) -> None:
        """The run goes on from that step."""
        self._first_step = self._step = step

    def enter(self, category: str) -> None:
        """What follows belongs to that category."""
        now = time.time()
        self._totals[self._category] += now - self._since
        self._category, self._since = category, now

    @contextmanager
    def spent_on(self, category: str) -> Iterator[None]:
        """What is inside belongs to that category, and what follows to the one before."""
        before = self._category
        self.enter(category)
        try:
            yield
        finally:
            self.enter(before)

    @contextmanager
    def compilations_apart(self) -> Iterator[None]:
        """What JAX spends inside on tracing and compiling belongs to 'compile'.

        For programs that are compiled in the midst of other work, where no `spent_on` can tell.
        """
        import jax.monitoring  # not for those who only read a ledger

        own, spans = threading.get_ident(), []

        def ended(event: str, start: float, end: float, **_: Any) -> None:
            if not event.startswith("/jax/core/compile/") or threading.get_ident() != own:
                return
            # One function's tracing contains that of those it calls, which were told before.
            inner = sum(e - s for s, e in spans if s >= start)
            spans[:] = [*(span for span in spans if span[0] < start), (start, end)]
            self._totals["compile"] += end - start - inner
            self._totals[self._category] -= end - start - inner

        jax.monitoring.register_event_time_span_listener(ended)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_time_span_listener(ended)

    def beat(self, step: int) -> None:
        """So many steps are done. Writes a line, unless one was written this second."""
        self._step = step
        if time.time() - self._written_at >= _SECONDS_BETWEEN_LINES:
            self.write()

    def write(self) -> None:
        """Appends the totals so far."""
        self.enter(self._category)
        self._written_at = self._since
        if self._path is None:
            return
        line = {"born": self._born, "until": self._since, "steps": [self._first_step, self._step]}
        line["seconds"] = {name: round(self._totals[name], 4) for name in CATEGORIES[:-2]}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def account(workdir: Path) -> dict[str, float]:
    """Seconds of each of `CATEGORIES`, from the first start to the last line.

    Steps that a later process did again are moved from `USEFUL` to 'lost', by their share of their
    process's time. 'down' is the time between the last line of a process and the next birth: what
    restarting took, and before a kill up to a second or the step or rollout under way.

    Raises:
      FileNotFoundError: no run was in `workdir`.
    """
    lives: dict[float, dict[str, Any]] = {}
    for text in (workdir / FILE).read_text().split("\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill, and the next process went on behind it
        lives[line["born"]] = line
    total: Counter[str] = Counter({name: 0.0 for name in CATEGORIES})
    ordered = [lives[born] for born in sorted(lives)]
    for life, following in zip(ordered, [*ordered[1:], None], strict=True):
        seconds, (first, last) = dict(life["seconds"]), life["steps"]
        if following is not None:
            total["down"] += max(0.0, following["born"] - life["until"])
            redone = max(0, last - max(first, following["steps"][0]))
            for name in USEFUL:
                lost = seconds.get(name, 0.0) * redone / max(1, last - first)
                seconds[name] = seconds.get(name, 0.0) - lost
                total["lost"] += lost
        total.update(seconds)
    return dict(total)


def summary(seconds: dict[str, float]) -> str:
    """One line: the share of each category that took any, the largest first."""
    whole = sum(seconds.values())
    shares = sorted(((100 * s / whole, name) for name, s in seconds.items()), reverse=True)
    return ", ".join(f"{name} {share:.1f} %" for share, name in shares if share >= 0.05)


def _birth() -> float:
    """When this process began, in seconds since the epoch."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return time.time()
    return time.time() - age

"""A run that hangs ends: stacks of every thread, then an exit that a supervisor restarts."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_HUNG = 70
_STEPS = 5  # median step times that a step may take, if that is more than the limit
_PAUSED = 30  # times the limit for evaluations, saves and the programs they compile


class Watchdog:
    """`beat` once a step; armed by the second, because the first steps compile.

    A data worker, a collective with a dead peer or a stuck disk stop the beats. Then each process
    writes its threads' stacks to WORKDIR/stacks-PROCESS.txt and stderr and exits with 70.
    """

    def __init__(self, workdir: Path, process: int, seconds: float):
        """`seconds` is the least time a step is given; 0 leaves the watchdog out."""
        self._path, self._seconds = workdir / f"stacks-{process}.txt", seconds
        self._times: deque[float] = deque(maxlen=64)
        self._last = self._deadline = None
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._times.append(now - self._last)
            self._deadline = now + max(self._seconds, _STEPS * statistics.median(self._times))
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is no step: thirty times the limit."""
        armed, self._last = self._deadline is not None, None
        self._deadline = time.monotonic() + _PAUSED * self._seconds if armed else None
        yield
        self._last = time.monotonic()
        self._deadline = self._last + _PAUSED * self._seconds if armed else None

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                with self._path.open("w") as file:
                    faulthandler.dump_traceback(file)
                faulthandler.dump_traceback(sys.stderr)
                print(f"no step ended in time; stacks in {self._path}", file=sys.stderr, flush=True)
                os._exit(EXIT_HUNG)  # what hangs would hang an orderly end too

"""How a person reaches a running job: stop it with a signal, profile it by touching a file."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

PROFILED_STEPS = 3


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second SIGINT interrupts at once.

    Python delivers signals to the main thread only; elsewhere the event is never set.
    """
    stop = threading.Event()

    def handler(number, frame):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


class Profiler:
    """`touch WORKDIR/PROFILE` traces the next three steps into WORKDIR/profile."""

    def __init__(self, workdir: Path):
        self._request, self._output = workdir / "PROFILE", workdir / "profile"
        self._steps_left = 0

    def before_step(self) -> None:
        if not self._steps_left and self._request.exists():
            self._request.unlink(missing_ok=True)
            jax.profiler.start_trace(str(self._output))
            self._steps_left = PROFILED_STEPS

    def after_step(self, results: Any) -> None:
        """`results` are arrays of the step: the trace ends when the last step has ended."""
        if self._steps_left:
            self._steps_left -= 1
            if not self._steps_left:
                jax.block_until_ready(results)
                jax.profiler.stop_trace()

    def close(self) -> None:
        if self._steps_left:
            jax.profiler.stop_trace()

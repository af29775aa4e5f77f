"""How far a long write is: a bar on a terminal, a line every 10 seconds elsewhere."""

import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

_SECONDS_A_LINE = 10


class Progress:
    """Use it as a context: `with Progress("writing", total_bytes) as progress`."""

    def __init__(self, label: str, total: int, quiet: bool = False):
        self._label, self._total = label, total
        self._done = self._skipped = 0
        self._start = self._last_line = time.monotonic()
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.stop()
        if kind is None and self._bar.disable:
            self._line()

    def skip(self, num_bytes: int) -> None:
        """What an earlier call has done, which says nothing about the speed of this one."""
        self._skipped += num_bytes
        self.advance(num_bytes)

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._bar.update(self._task, completed=self._done)
        if self._bar.disable and time.monotonic() - self._last_line >= _SECONDS_A_LINE:
            self._last_line = time.monotonic()
            self._line()

    def _line(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        speed = (self._done - self._skipped) / seconds
        left = f", {(self._total - self._done) / speed:,.0f} s left" if speed else ""
        self._console.print(
            f"{self._label}: {self._done / 1e9:,.1f} of {self._total / 1e9:,.1f} GB, "
            f"{speed / 1e6:,.0f} MB/s{left}"
        )

"""A run that hangs ends and says where; one that is slow does not."""

import subprocess
import sys
import time

from dsv3_jax.train.watchdog import EXIT_HUNG, Watchdog

HANGS = """
import sys, time
from pathlib import Path
from dsv3_jax.train.watchdog import Watchdog

watchdog = Watchdog(Path(sys.argv[1]), 0, 0.5)
for _ in range(4):
    watchdog.beat()
    time.sleep(0.02)

def stuck_collective():
    time.sleep(600)

stuck_collective()
"""


def test_stacks_and_exit_code_within_the_limit(tmp_path):
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EXIT_HUNG, done.stderr
    assert time.monotonic() - started < 30
    assert "stuck_collective" in (tmp_path / "stacks-0.txt").read_text()
    assert "no step ended in time" in done.stderr and "stuck_collective" in done.stderr


def test_slow_but_regular_steps_pauses_and_the_first_step_are_waited_for(tmp_path):
    """Any of these waits would have ended this very process."""
    watchdog = Watchdog(tmp_path, 0, 0.1)
    time.sleep(0.3)  # compiles
    for _ in range(4):
        watchdog.beat()
        time.sleep(0.05)
    with watchdog.paused():
        time.sleep(0.4)
    time.sleep(0.2)
    for _ in range(3):
        watchdog.beat()
    watchdog.close()
    time.sleep(0.3)
    assert not list(tmp_path.iterdir())


def test_zero_seconds_means_none(tmp_path):
    watchdog = Watchdog(tmp_path, 0, 0.0)
    watchdog.beat()
    watchdog.beat()
    watchdog.close()

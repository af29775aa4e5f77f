"""SIGKILL of real runs, over and over: every next start goes on, and no bit of a loss changes.

No kill costs more steps than `checkpoint.max_lost_steps`, nor two intervals where that is none.

DSV3_KILLS=200 pytest -m slow tests/reliability/test_kills.py -s    the nightly size
"""

import os
import random
import time

import pytest
from runs import losses, run, start

from dsv3_jax.checkpoint.reader import steps_in

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("DSV3_KILLS", "25"))
INTERVAL = 2  # steps
CHANGES = (
    "run.num_steps=200",
    "optim.total_tokens=12800",
    f"checkpoint.interval_steps={INTERVAL}",
    "checkpoint.keep=2",
)
# Most steps lost by checkpoint.max_lost_steps, which changes from start to start.
BOUNDS = {str(INTERVAL): INTERVAL, str(INTERVAL + 1): INTERVAL + 1, "none": 2 * INTERVAL}
AIMED = ("before_manifest", "before_commit", "after_commit", "in_deletion")


def steps_logged(workdir):
    """Whole lines: a killed process may leave half of one."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def started_and_killed(workdir, cache, max_lost, point, seconds):
    """Kills at `point`, or `seconds` after a new step; False if the run was complete before."""
    before = steps_logged(workdir)
    fault = {"DSV3_FAULT": f"{point}=kill"} if point else {}
    bound = f"checkpoint.max_lost_steps={max_lost}"
    process = start(workdir, *CHANGES, bound, JAX_COMPILATION_CACHE_DIR=str(cache), **fault)
    if not point:
        while process.poll() is None and steps_logged(workdir) <= before:
            time.sleep(0.01)
        time.sleep(seconds)
        process.kill()
    output = process.communicate(timeout=300)[0]
    assert process.returncode in (0, -9), output
    return process.returncode == -9


def test_a_run_killed_at_random_loses_nothing(tmp_path):
    cache, seed = tmp_path / "compiled", random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    options = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    code, output = run(tmp_path / "whole", *CHANGES, **options)
    assert code == 0, output
    expected = losses(tmp_path / "whole")
    kills, runs, lost = 0, 0, {max_lost: [] for max_lost in BOUNDS}
    while kills < KILLS:
        workdir, complete = tmp_path / f"killed{runs}", False
        runs += 1
        while not complete and kills < KILLS:
            point = rng.choice(AIMED) if kills % 2 else None
            max_lost, seconds = list(BOUNDS)[kills % len(BOUNDS)], rng.uniform(0, 0.5)
            complete = not started_and_killed(workdir, cache, max_lost, point, seconds)
            if not complete:
                kills += 1
                saved = max(steps_in(workdir / "checkpoints"), default=0)
                lost[max_lost].append(steps_logged(workdir) - saved)
                assert lost[max_lost][-1] <= BOUNDS[max_lost], (max_lost, point)
        if not complete:
            code, output = run(workdir, *CHANGES, **options)
            assert code == 0, output
        assert losses(workdir) == expected
    for max_lost, steps in lost.items():
        print(f"max_lost_steps={max_lost}: {len(steps)} kills lost at most {max(steps)} steps")

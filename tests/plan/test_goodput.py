"""The goodput simulation against closed forms, and against a plain loop over time."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.plan.goodput import (
    Cluster,
    best_interval,
    daly_interval,
    draw_history,
    expected_goodput,
    simulate,
    young_interval,
)

ROOT = Path(__file__).parents[2]
SIZES = [2_048, 100_000]


def smooth(chips, **values):
    return Cluster(chips=chips, slow_fraction=0.0, **values)


@pytest.mark.parametrize("chips", SIZES)
def test_goodput_equals_the_closed_form_at_every_interval(chips):
    cluster = smooth(chips)
    history = draw_history(cluster, num_failures=400_000)
    for factor in (0.5, 1, 2, 8):
        interval = factor * daly_interval(cluster)
        found = simulate(cluster, history, interval)
        expected = expected_goodput(cluster, interval)
        assert found.useful_error < 1e-3
        assert abs(found.useful - expected) < 4 * found.useful_error
        # What saves and lost steps cost, the part that the interval decides, within 2 %.
        limit = expected_goodput(smooth(chips, blocking_seconds=1e-9, save_seconds=55.0), 1e-3)
        assert limit - found.useful == pytest.approx(limit - expected, rel=0.02)


@pytest.mark.parametrize("chips", SIZES)
def test_best_interval_is_dalys(chips):
    """Over seeds the search varies by 0.2 %, a tenth of what is asserted."""
    cluster = smooth(chips)
    best = best_interval(cluster, draw_history(cluster, num_failures=400_000, seed=1))
    assert best == pytest.approx(daly_interval(cluster), rel=0.02)
    # Young's is the same to first order in sqrt(C / 2M): 0.5 % and 3.7 %.
    assert best == pytest.approx(
        young_interval(cluster),
        rel=0.02 + np.sqrt(cluster.blocking_seconds / (2 * cluster.mtbf_seconds)),
    )


def test_what_is_written_behind_the_steps_and_restarts_leave_the_best_interval_alone():
    cluster = smooth(100_000, save_seconds=110.0, reschedule_seconds=600.0)
    history = draw_history(cluster, num_failures=400_000)
    assert best_interval(cluster, history) == pytest.approx(daly_interval(cluster), rel=0.02)
    assert simulate(cluster, history, 130.0).useful < 0.8 * expected_goodput(smooth(100_000), 130.0)


def test_a_save_waits_for_the_one_before():
    """Steps of 5 s between saves that take 60: 55 s of each minute stand still."""
    cluster = smooth(64)
    found = simulate(cluster, draw_history(cluster, num_failures=2_000), 5.0)
    assert found.saving / found.useful == pytest.approx(11)


def test_simulation_equals_a_loop_over_time():
    """The same failures played save by save, with slow nodes and saves that are cut off."""
    cluster = Cluster(chips=50_000, slow_fraction=0.01, save_seconds=150.0)
    history = draw_history(cluster, num_failures=300, seed=3)
    interval, useful = 200.0, 0.0
    for uptime, slowdown in zip(history.uptimes, history.slowdowns, strict=True):
        now = 0.0
        while True:
            now += interval * slowdown
            if now + cluster.save_seconds > uptime:
                break
            useful += interval
            now += cluster.blocking_seconds
    found = simulate(cluster, history, interval)
    wall = history.uptimes.sum() + history.restarts.sum()
    assert found.useful == pytest.approx(useful / wall, rel=1e-9)
    shares = (found.useful, found.straggling, found.saving, found.lost, found.restarting)
    assert min(shares) > 0 and sum(shares) == pytest.approx(1)


def test_a_restart_that_fails_starts_over():
    cluster = smooth(300_000)
    mean = draw_history(cluster, num_failures=400_000).restarts.mean()
    mtbf = cluster.mtbf_seconds
    assert mean > 1.2 * cluster.restart_seconds
    assert mean == pytest.approx(mtbf * np.expm1(cluster.restart_seconds / mtbf), rel=0.01)


def test_steps_wait_for_the_slowest_node():
    """Against nodes drawn one by one."""
    cluster = Cluster(chips=8 * 500, slow_fraction=0.004, slow_excess=0.1)
    found = draw_history(cluster, num_failures=100_000).slowdowns
    generator = np.random.default_rng(0)
    excess = generator.exponential(0.1, (20_000, 500))
    excess *= generator.uniform(size=excess.shape) < 0.004
    drawn = 1 + excess.max(axis=1)
    assert found.mean() == pytest.approx(drawn.mean(), rel=0.01)
    assert np.mean(found == 1) == pytest.approx(0.996**500, rel=0.05)
    assert np.quantile(found, 0.9) == pytest.approx(np.quantile(drawn, 0.9), rel=0.01)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"mtbf_hours": 0.0}, "mtbf_hours=0.0 must be above 0"),
        ({"detect_seconds": -1.0}, "detect_seconds=-1.0 must be at least 0"),
        ({"blocking_seconds": 90.0}, "blocking_seconds=90.0 exceeds save_seconds=60.0"),
        ({"slow_fraction": 1.5}, r"slow_fraction=1.5 must lie in \[0, 1\]"),
    ],
)
def test_impossible_clusters_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Cluster(chips=8, **values)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.goodput", "--num_failures=2000", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_command_prints_both_sizes_and_draws(tmp_path):
    figure = tmp_path / "goodput.png"
    done = command("--minutes=5,60", f"--figure={figure}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Daly's interval") == 2
    for shown in ("2,048 chips: a failure every 24.7", "100,000 chips: a failure every 0.51 h",
                  "  5.0 min", " 60.0 min", "best interval"):  # fmt: skip
        assert shown in done.stdout, done.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_a_misspelt_field_is_one_line():
    done = command("--set=mtbf_hour=1")
    assert done.returncode == 2
    assert "did you mean 'mtbf_hours'" in done.stderr and done.stderr.count("\n") == 1

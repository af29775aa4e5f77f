"""Runs whose disk is full or away for a while, and where the time of a run went."""

import json
import shutil
import subprocess
import sys
import time

import jax
import pytest
from runs import ROOT, losses, records, run, start, stop

from dsv3_jax.checkpoint.reader import steps_in
from dsv3_jax.train.ledger import CATEGORIES, FILE, Ledger, account, summary

GRPO = (
    *("grpo.group_size=2", "grpo.max_answer_tokens=3", "data.sequence_length=23"),
    *("optim.total_tokens=27600", "run.eval_interval=100"),
)
LONGER = ("run.num_steps=300", "optim.total_tokens=19200", "checkpoint.interval_steps=100")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount file systems")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_nothing_saved_is_lost(undisturbed, small_disk):
    workdir, filler = small_disk / "run", small_disk / "filler"
    cache = f"data.cache_dir={small_disk.parent / 'cache'}"
    code, output = run(workdir, cache, "run.num_steps=4")
    assert code == 0 and steps_in(workdir / "checkpoints") == [2, 4], output
    for left, message in ((80_000, f"saving checkpoint 10 in {workdir}"), (0, "cannot be written")):
        filler.unlink(missing_ok=True)
        filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - left))
        code, output = run(workdir, cache)
        assert code == 2, output
        (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert message in error and "Traceback" not in output, output
        assert steps_in(workdir / "checkpoints") == [2, 4]
    filler.unlink()
    code, output = run(workdir, cache)
    assert code == 0, output
    assert losses(workdir) == undisturbed


@pytest.mark.slow
def test_a_disk_that_was_full_once_costs_nothing(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    code, output = run(workdir, DSV3_FAULT="before_manifest=raise")
    assert code == 0 and "trying again in 1 s" in output, output
    assert losses(workdir) == undisturbed
    assert records(workdir)[-1]["save_failures"] == 1
    assert "save_failures" not in records(workdir)[0]


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["stop", "continue"])
def test_a_disk_that_is_full_for_long(choice, tmp_path):
    workdir = tmp_path / "run"
    changes = *LONGER, f"checkpoint.on_save_error={choice}", "run.num_steps=100000"
    fault = "before_manifest@*=raise"
    process = start(workdir, *changes, "optim.total_tokens=1e9", DSV3_FAULT=fault)
    if choice == "stop":
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 2 and "error: saving checkpoint" in output, output
        assert output.count("trying again in") == 3
        assert steps_in(workdir / "checkpoints") == []
        return
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count('"save_failures": 6') == 0:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    stop(process)  # the last save is one that must succeed
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "training goes on without" in output, output


def test_a_clock_belongs_to_one_category_at_a_time(tmp_path, monkeypatch):
    """Two processes on a clock of our own; the second does two steps of the first again."""
    now = [1000.0]
    monkeypatch.setattr("dsv3_jax.train.ledger.time.time", lambda: now[0])
    monkeypatch.setattr("dsv3_jax.train.ledger._birth", lambda: now[0])

    def live(first, steps, seconds):
        ledger = Ledger(tmp_path, writes=True)
        now[0] += 3
        with ledger.spent_on("restore"):
            now[0] += 2
        ledger.resumed(first)
        ledger.enter("steps")
        for step in range(first, first + steps):
            with ledger.spent_on("data"):
                now[0] += 0.25
            now[0] += seconds
            ledger.beat(step + 1)

    live(0, 5, 4.0)
    now[0] += 7  # killed, and started again
    live(3, 4, 2.0)
    assert account(tmp_path) == {
        "steps": 5 * 4.0 * 3 / 5 + 4 * 2.0, "rollout": 0, "reward": 0, "compile": 0,
        "data": 2.25, "evaluate": 0, "save": 0, "restore": 4, "start": 6, "end": 0,
        "lost": 8.0, "down": 7.0,
    }  # fmt: skip
    assert sum(account(tmp_path).values()) == now[0] - 1000
    with (tmp_path / FILE).open("a") as file:
        file.write('{"born": 1')  # a kill in mid-write
    assert sum(account(tmp_path).values()) == now[0] - 1000
    assert summary(account(tmp_path)).startswith("steps 42.")


def test_lost_steps_of_grpo_take_their_rollouts_and_rewards_along(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("dsv3_jax.train.ledger.time.time", lambda: now[0])
    monkeypatch.setattr("dsv3_jax.train.ledger._birth", lambda: now[0])
    for first in (0, 1):
        ledger = Ledger(tmp_path, writes=True)
        ledger.resumed(first)
        ledger.enter("steps")
        for step in range(first, first + 4):
            for category, seconds in (("rollout", 3), ("reward", 2)):
                with ledger.spent_on(category):
                    now[0] += seconds
            now[0] += 1
            ledger.beat(step + 1)
    found = {name: seconds for name, seconds in account(tmp_path).items() if seconds}
    assert found == {"steps": 5.0, "rollout": 15.0, "reward": 10.0, "lost": 18.0}


def test_compilations_are_taken_out_of_what_they_happen_in(tmp_path):
    def slow_to_trace(x):
        time.sleep(0.2)
        return jax.jit(also_slow_to_trace)(x) + 1

    def also_slow_to_trace(x):
        time.sleep(0.2)
        return x + 1

    ledger = Ledger(tmp_path, writes=True)
    ledger.enter("steps")
    with ledger.compilations_apart(), ledger.spent_on("rollout"):
        started = time.time()
        jax.block_until_ready(jax.jit(slow_to_trace)(1.0))
        compiled = time.time() - started
        time.sleep(0.3)
    ledger.write()
    seconds = account(tmp_path)
    assert 0.4 <= seconds["compile"] <= compiled  # the inner function's time counts once
    assert 0.3 <= seconds["rollout"] < 0.3 + compiled - 0.4 + 0.1
    jax.block_until_ready(jax.jit(lambda x: slow_to_trace(x) + 2)(1.0))
    ledger.write()
    assert account(tmp_path)["compile"] == seconds["compile"]  # no more after the block


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "grpo"])
def test_the_ledger_of_a_killed_run_is_its_wall_time(command, base, tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "fired").mkdir()
    changes = list(LONGER)
    if command == "grpo":
        changes += [*GRPO, f"checkpoint.initial_weights={base[0]}"]
    born = time.time()
    process = start(
        workdir,
        *changes,
        command=command,
        supervised=True,
        BACKOFF="2",
        DSV3_FAULT="before_step@150=kill,before_step@290=kill",
        DSV3_FAULT_ONCE=str(tmp_path / "fired"),
    )
    output, wall = "", 0.0
    for line in process.stdout:
        output += line
        if line.startswith("done: "):  # what the interpreter then takes to end, it cannot write
            wall = time.time() - born
    assert process.wait() == 0, output
    shown = subprocess.run(
        [sys.executable, "-m", "tools.ledger", f"--workdir={workdir}", "--format=json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = json.loads(shown.stdout)
    assert tuple(seconds) == CATEGORIES
    print({name: round(s, 1) for name, s in seconds.items()}, f"of {wall:.1f} s")
    assert abs(sum(seconds.values()) - wall) < 0.01 * wall
    assert seconds["lost"] > 0 and seconds["down"] > 2 + 2 and seconds["restore"] > 0
    assert min(seconds.values()) >= 0 and "time " in output
    if command == "grpo":
        assert min(seconds[name] for name in ("steps", "rollout", "reward", "compile")) > 0


def test_a_folder_without_a_run_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.ledger", f"--workdir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and FILE in done.stderr

"""Runs that meet NaN, spikes, flipped bits, hangs, signals and dead peers, as real processes."""

import json
import time

import pytest
from runs import losses, records, run, start, start_two, stop

from dsv3_jax.checkpoint.reader import steps_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed_two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed_two") / "run"
    processes = start_two(workdir)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return losses(workdir)


def test_nan_and_a_spike_are_skipped_and_the_run_goes_on(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    faults = "mtp_weight@2=nan,mtp_weight@8=spike"
    code, output = run(workdir, "guard.window=4", DSV3_FAULT=faults)
    assert code == 0, output
    found = records(workdir)
    assert [r["step"] for r in found if r.get("skipped")] == [2, 8]
    assert "step 2 was skipped" in output and "step 8 was skipped" in output
    # Step 2's own loss is of the weights before it, and step 3 has them still.
    assert [r["loss_hex"] for r in found][:3] == undisturbed[:3]
    assert found[3]["loss_hex"] != undisturbed[3]
    report = json.loads((workdir / "skipped/step_2.json").read_text())
    assert any(norm != norm for norm in report["gradient_norms"].values())
    assert (workdir / "skipped/step_8_process_0.npz").exists()


def test_three_in_a_row_end_the_run_in_one_line(tmp_path):
    faults = ",".join(f"mtp_weight@{step}=nan" for step in (3, 4, 5))
    code, output = run(tmp_path / "run", DSV3_FAULT=faults)
    assert code == 2 and "error: 3 steps in a row were skipped" in output
    assert "Traceback" not in output


def test_a_hang_ends_with_stacks_and_the_next_start_goes_on(undisturbed, tmp_path):
    workdir, started = tmp_path / "run", time.monotonic()
    code, output = run(workdir, "guard.hang_seconds=2", DSV3_FAULT="before_step@7=hang")
    assert code == 70 and time.monotonic() - started < 120, output
    assert "reach" in (workdir / "stacks-0.txt").read_text()
    assert run(workdir)[0] == 0
    assert losses(workdir) == undisturbed


def test_a_flipped_bit_is_seen_and_nothing_of_it_is_saved(undisturbed, tmp_path):
    workdir, check = tmp_path / "run", "guard.recheck_interval=2"
    for code in (16, 17):
        got, output = run(workdir, check, DSV3_FAULT="after_rehearsal@6=flip")
        assert got == code and "step 6 was computed twice and differs" in output, output
    assert len((workdir / "corruption.jsonl").read_text().splitlines()) == 2
    assert run(workdir, check)[0] == 0
    assert losses(workdir) == undisturbed  # rehearsals change nothing


def test_a_signal_to_one_of_two_processes_stops_both_at_one_step(undisturbed_two, tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(workdir, "run.num_steps=100000", "optim.total_tokens=640")
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 4:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    started = time.monotonic()
    stop(processes[1])
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert time.monotonic() - started < 25
    before = losses(workdir)
    assert before[:10] == undisturbed_two[: len(before)]
    assert f"stopped before step {len(before)}" in outputs[0]
    processes = start_two(workdir, f"run.num_steps={len(before) + 3}", "optim.total_tokens=640")
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert losses(workdir)[: len(before)] == before


def test_a_killed_peer_ends_the_other_and_the_supervisors_finish_the_run(undisturbed_two, tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "fired").mkdir()
    processes = start_two(
        workdir,
        faults=("", "before_step@5=kill"),
        supervised=True,
        BACKOFF="1",
        DSV3_FAULT_ONCE=str(tmp_path / "fired"),
    )
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "supervise: code 137" in outputs[1] and "supervise: code " in outputs[0]
    assert losses(workdir) == undisturbed_two


def test_sigterm_is_a_saved_checkpoint_and_75_within_25_seconds(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, DSV3_FAULT="")
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or not metrics.read_text().count("\n"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    started = time.monotonic()
    stop(process)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output  # ten steps take longer than it takes to ask
    assert time.monotonic() - started < 25
    assert run(workdir)[0] == 0
    assert losses(workdir) == undisturbed


@pytest.mark.parametrize(
    "process, point, max_lost, saved",
    [
        (0, "before_manifest", "none", [2, 6, 8, 10]),
        (1, "after_write", "none", [2, 6, 8, 10]),
        (1, "after_write", "3", [2, 5, 6, 8, 10]),  # a further try before step 6 could be lost
    ],
)
def test_a_save_that_one_of_two_processes_fails_is_made_up_for(
    process, point, max_lost, saved, undisturbed_two, tmp_path
):
    workdir, faults = tmp_path / "run", ["", ""]
    faults[process] = f"{point}@4=raise"
    changes = "checkpoint.on_save_error=continue", f"checkpoint.max_lost_steps={max_lost}"
    processes = start_two(workdir, "checkpoint.keep=9", *changes, faults=tuple(faults))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert losses(workdir) == undisturbed_two
    assert steps_in(workdir / "checkpoints") == saved
    assert "Traceback" not in "".join(outputs)
    assert "saving checkpoint 4 in" in outputs[0] and f"fault at {point}" in outputs[0]
    assert ("process 1: saving" in outputs[0]) == (process == 1)  # process 0 speaks for all
    assert [r.get("save_failures", 0) for r in records(workdir)][-1] == 1


@pytest.mark.parametrize("process, point", [(0, "before_manifest"), (1, "after_write")])
def test_saves_that_one_of_two_processes_never_makes_end_both(process, point, tmp_path):
    faults = ["", ""]
    faults[process] = f"{point}@*=raise"
    processes = start_two(tmp_path / "run", "run.num_steps=100000", faults=tuple(faults))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    for output in outputs:
        assert output.count("error: ") == 1 and "Traceback" not in output, output
        assert f"fault at {point}" in output
    assert steps_in(tmp_path / "run/checkpoints") == []

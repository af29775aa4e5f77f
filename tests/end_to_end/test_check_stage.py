"""`python -m tools.check_stage`: what has improved passes, what has not ends a recipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path):
    """A results file {"runs": [0.2, 0.9]} and the metrics of six steps."""
    results, metrics = tmp_path / "results.json", tmp_path / "metrics.jsonl"
    results.write_text(json.dumps({"runs": [0.2, 0.9], "none": None}))
    rewards = [0.1, 0.3, 0.2, 0.6, 0.9, 0.8]
    lines = [{"step": i, "reward": r, "loss": 1.0 - r} for i, r in enumerate(rewards)]
    lines[0]["validation_loss"], lines[5]["validation_loss"] = 3.0, 4.0
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return results, metrics


def check(before, after, *flags):
    command = [sys.executable, "-m", "tools.check_stage", "--name=m", *flags]
    command += [f"--before={before}", f"--after={after}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "keys, flags, code, told",
    [
        ("runs.0 runs.-1", [], 0, "0.2 -> 0.9: ok"),
        ("runs.1 runs.0", [], 1, "FAILED, more than before"),
        ("runs.1 runs.0", ["--report_only"], 0, "0.9 -> 0.2"),
        ("runs.0 runs.1", ["--before_below=0.2"], 1, "FAILED, before: below 0.2"),
        ("runs.0 runs.1", ["--before_below=0.3", "--after_at_least=0.9"], 0, "ok"),
        ("runs.0 runs.1", ["--after_above=0.9"], 1, "FAILED, after: above 0.9"),
        ("runs.0 runs.1", ["--gain=0.8"], 1, "FAILED, gain: at least 0.8"),
        ("runs.0 none", [], 2, "has no number at none"),
    ],
)
def test_values_of_a_results_file(files, keys, flags, code, told):
    before, after = (f"{files[0]}:{key}" for key in keys.split())
    done = check(before, after, *flags)
    assert done.returncode == code and told in done.stdout + done.stderr


def test_the_first_and_last_lines_of_metrics(files):
    def of(key):
        return [f"{files[1]}:{key}"] * 2

    assert "0.2 -> 0.7667: ok" in check(*of("reward"), "--window=3").stdout
    assert check(*of("loss"), "--less_is_better").returncode == 0
    assert "3 -> 4: FAILED, less" in check(*of("validation_loss"), "--less_is_better").stdout

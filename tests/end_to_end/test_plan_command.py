"""`python -m tools.plan` as a user runs it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
V3 = "--config=deepseek_v3_671b"


def plan(*args):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tools.plan", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_plan_of_the_671b_run():
    started = time.perf_counter()
    result = plan(V3, "--topology=h200:128x1x8", "--format=json")
    seconds = time.perf_counter() - started
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["parameters"]["total"] == 671_026_419_200
    assert data["flops_per_token"] == pytest.approx(250.46e9, rel=1e-4)
    assert data["kv_cache_bytes_per_token"] == 70_272
    memory = data["memory"]["estimated"]
    total = memory.pop("total")
    assert total == sum(memory.values()) and data["memory"]["fits"]
    step = data["step"].pop("seconds")
    assert step == pytest.approx(sum(data["step"].values()))
    assert data["tokens_per_second"] == pytest.approx(15360 * 4096 / step)
    assert data["device_hours"] == pytest.approx(14.8e12 / data["tokens_per_second"] * 1024 / 3600)
    assert data["dollars"] == pytest.approx(2 * data["device_hours"])
    assert seconds < 5 * 4  # 2.5 s alone; the suite may keep the machine busy


def test_table_says_what_does_not_fit_and_what_helps():
    result = plan(V3, "--topology=h200:128x1x8", "--set=parallel.max_deferred=none")
    assert result.returncode == 0, result.stderr
    assert "does not fit; largest: queued weight gradients 11" in result.stdout
    assert "parallel.max_deferred=1" in result.stdout


def test_search_ranks_plans():
    result = plan("--config=small", "--topology=h200:1x1x8", "--search", "--format=json")
    assert result.returncode == 0, result.stderr
    plans = json.loads(result.stdout)
    speeds = [entry["tokens_per_second"] for entry in plans]
    assert len(plans) == 10 and speeds == sorted(speeds, reverse=True)
    best = [f"--set={change}" for change in plans[0]["set"]]
    again = plan("--config=small", "--topology=h200:1x1x8", "--format=json", *best)
    assert json.loads(again.stdout)["tokens_per_second"] == pytest.approx(speeds[0])
    table = plan("--config=small", "--topology=h200:1x1x8", "--search").stdout
    assert "fastest first" in table and f"{speeds[0]:,.0f}" in table


@pytest.mark.parametrize(
    "args, problem",
    [
        ((V3,), "--topology is missing"),
        ((V3, "--topology=h2000:1x1x8"), "did you mean 'h200'"),
        ((V3, "--topology=h200:256x1x8"), "--set parallel.data=2"),
        ((V3, "--topology=h200:128x1x8", "--search", "--compile"), "--search compiles nothing"),
        ((V3, "--topology=h200:128x1x8", "--set=parallel.pip=2"), "did you mean"),
    ],
)
def test_mistakes_end_in_one_line(args, problem):
    result = plan(*args)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and problem in result.stderr

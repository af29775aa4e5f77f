"""The ablation table: what it reads from a run, and the real command at its smallest."""

import json
import subprocess
import sys

import pytest

from experiments.ablate import VARIANTS, summarise, table


def test_summary_takes_the_last_validation_and_the_last_tenth_of_maxvio(tmp_path):
    records = [{"step": step, "max_violation": float(step)} for step in range(1, 21)]
    records[4]["validation_loss"], records[-1]["validation_loss"] = 5.0, 3.0
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert summarise(file) == {"validation_loss": 3.0, "max_violation": 19.5}


def test_table_shows_mean_and_spread():
    runs = [{"validation_loss": 2.0, "max_violation": 0.1}]
    runs.append({"validation_loss": 2.2, "max_violation": 0.3})
    assert "| a | 2.1000 ± 0.1000 | 0.2000 ± 0.1000 |" in table({"a": runs})


@pytest.mark.slow
def test_command(tmp_path):
    overrides = ["run.num_steps=4", "run.eval_interval=4", "data.max_documents=60"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "parallel.data=1", "parallel.expert=1"]
    command = [sys.executable, "-m", "experiments.ablate", "--seeds=1"]
    command += [f"--set={override}" for override in overrides]
    command += [f"--workdir={tmp_path / 'runs'}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    results = json.loads((tmp_path / "runs" / "ablation.json").read_text())
    assert set(results) == set(VARIANTS)
    assert all(variant in process.stdout for variant in VARIANTS)

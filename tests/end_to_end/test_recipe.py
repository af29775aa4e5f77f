"""The recipe runs every stage from the first to the last, in its shortest form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hurry import COMMAND_FLAGS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_stage_runs(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    short = {"PATH": path, "SHORT": "1", "XLA_FLAGS": COMMAND_FLAGS}
    done = subprocess.run(
        [ROOT / "experiments/recipes/tiny_end_to_end.sh", tmp_path / "road"],
        env=os.environ | short, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measures = (tmp_path / "road" / "measures.txt").read_text()
    for name in ("pre-training", "needle", "loss, SFT", "match, SFT", "GRPO", "distil", "served"):
        assert name in measures
    for run in ("pretrained", "extended/phase_2_256", "sft", "grpo", "without", "student"):
        assert list((tmp_path / "road" / run / "checkpoints").iterdir()), run
    assert (tmp_path / "road" / "extended" / "phase_2_256" / "needle.png").exists()
    problems = (tmp_path / "road" / "few" / "problems.jsonl").read_text().splitlines()
    answers = (tmp_path / "road" / "distilled" / "answers.jsonl").read_text().splitlines()
    assert len(answers) == len(problems)
    served = json.loads((tmp_path / "road" / "served.json").read_text())["tasks"][0]
    assert served["items"] == 25 and not served["failures"]

"""An undisturbed run skips no step.

DSV3_GOLDEN_STEPS=10000 pytest -m slow tests/reliability/test_golden_steps.py    the nightly size
"""

import os

import pytest
from runs import records, run

STEPS = int(os.environ.get("DSV3_GOLDEN_STEPS", "1000"))
SEQUENCES, TOKENS = 32, 32  # of a step


@pytest.mark.slow
def test_no_step_of_an_undisturbed_run_is_skipped(tmp_path):
    workdir = tmp_path / "run"
    changes = (
        f"run.num_steps={STEPS}", f"optim.total_tokens={STEPS * SEQUENCES * TOKENS}",
        f"data.sequences_per_step={SEQUENCES}", f"data.sequence_length={TOKENS}",
        "data.max_documents=400", "checkpoint.interval_steps=2000", "run.eval_interval=1000",
    )  # fmt: skip
    code, output = run(workdir, *changes, timeout=300 + STEPS)
    assert code == 0, output
    found = records(workdir)
    assert len(found) == STEPS and found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert [r["step"] for r in found if r.get("skipped")] == []

"""The ablation table: what it reads from a run, and the real command at its smallest."""

import json
import subprocess
import sys

import pytest

from dsv3_jax.overrides import load_config
from experiments.ablate import ABLATIONS, COLUMNS, summarise, table


def test_summary_takes_the_last_validation_the_last_tenth_of_maxvio_and_the_last_gap():
    records = [{"step": step, "max_violation": float(step), "loss": 4.0} for step in range(1, 21)]
    records[4]["validation_loss"], records[-1]["validation_loss"] = 5.0, 3.0
    baseline = [record | {"loss": 5.0, "validation_loss": 1.0} for record in records]
    summary = summarise(records, baseline)
    assert summary == {
        "validation_loss": 3.0,
        "max_violation": 19.5,
        "loss_gap": pytest.approx(-0.2),
    }
    assert summary.keys() == COLUMNS.keys()


def test_table_shows_mean_and_spread_of_the_columns_asked_for():
    runs = [{"validation_loss": 2.0, "max_violation": 0.1, "loss_gap": 0.01}]
    runs.append({"validation_loss": 2.2, "max_violation": 0.3, "loss_gap": 0.02})
    balance = table({"a": runs}, ("validation_loss", "max_violation")).splitlines()
    assert balance[0] == "| variant | validation loss | MaxVio |"
    assert balance[2] == "| a | 2.1000 ± 0.1000 | 0.2000 ± 0.1000 |"
    assert "| a | 1.500% ± 0.500% |" in table({"a": runs}, ("loss_gap",))


def test_precision_variants_are_the_recipe_and_one_departure_each():
    configs = [load_config("tiny", v).precision for v in ABLATIONS["precision"].variants.values()]
    baseline, recipe, *departures = configs
    assert (baseline.compute, recipe.compute) == ("bfloat16", "fp8")
    changed = [
        {key: value for key, value in vars(c).items() if value != getattr(recipe, key)}
        for c in departures
    ]
    assert changed == [{"gradient_scales": "blocks"}, {"promotion": False}, {"scales": "tensor"}]


def ablate(*arguments):
    command = [sys.executable, "-m", "experiments.ablate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=1800)


def test_a_misspelt_set_of_variants_is_one_line():
    failed = ablate("--variants=presicion")
    assert failed.returncode == 2
    assert "did you mean 'precision'?" in failed.stderr and failed.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_command(name, tmp_path):
    overrides = ["run.num_steps=4", "run.eval_interval=4", "data.max_documents=60"]
    overrides += [f"data.cache_dir={tmp_path / 'cache'}", "parallel.data=1", "parallel.expert=1"]
    overrides += ["model.num_layers=1", "model.num_dense_layers=0", "precision.remat=none"]
    overrides += ["data.sequences_per_step=4", "data.sequence_length=32"]
    done = ablate(
        f"--variants={name}",
        "--seeds=1",
        *(f"--set={override}" for override in overrides),
        f"--workdir={tmp_path / 'runs'}",
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
    variants = ABLATIONS[name].variants
    assert list(results) == list(variants)
    assert all(variant in done.stdout for variant in variants)
    assert results[next(iter(variants))][0]["loss_gap"] == 0

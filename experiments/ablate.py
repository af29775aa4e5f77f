"""Trains variants of one configuration that differ in one choice, and prints a table.

    python -m experiments.ablate [--variants=balance] [--config=tiny] [--set KEY=VALUE]...
                                 [--seeds=3] [--workdir=DIR]

`balance`: V3's loss-free balance, V2's auxiliary losses, no balance at all, and loss-free without
MTP. `precision`: bfloat16, V3's FP8 recipe, and the recipe without one of its parts (spec §5).
Every variant sees the same data and, seed by seed, the same initial numbers. The tables give at
the end of training

- the validation loss of the main model;
- MaxVio, mean over layers and over the last tenth of the steps;
- the loss gap: training loss, smoothed by an EMA of 0.9, over that of the first variant, minus 1;

each as mean and spread (half of max - min) over seeds. Runs that have ended are not repeated: the
command can be stopped and started again.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.errors import UserError, did_you_mean, run_main
from dsv3_jax.train.compare import relative_gaps


@dataclass(frozen=True)
class Ablation:
    """Variants to compare, and what the table tells of them."""

    variants: Mapping[str, tuple[str, ...]]  # name -> overrides; the first is the baseline
    columns: tuple[str, ...]  # keys of `COLUMNS`


ABLATIONS = {
    "balance": Ablation(
        {
            "loss-free balance, MTP": (),
            "auxiliary losses (V2), MTP": ("balance.method=auxiliary",),
            "no balance, MTP": ("balance.method=none",),
            "loss-free balance, no MTP": ("model.mtp_depth=0",),
        },
        ("validation_loss", "max_violation"),
    ),
    "precision": Ablation(
        {
            "bf16": ("precision=bf16",),
            "fp8": ("precision=fp8",),
            "fp8, 128x128 scales on activation gradients": (
                "precision=fp8",
                "precision.gradient_scales=blocks",
            ),
            "fp8, no promotion": ("precision=fp8", "precision.promotion=false"),
            "fp8, one scale a tensor": ("precision=fp8", "precision.scales=tensor"),
        },
        ("validation_loss", "loss_gap"),
    ),
}
# Title and format of a number.
COLUMNS = {
    "validation_loss": ("validation loss", "{:.4f}"),
    "max_violation": ("MaxVio", "{:.4f}"),
    "loss_gap": ("loss gap", "{:.3%}"),
}

_VARIANTS = flags.DEFINE_string("variants", "balance", f"One of {', '.join(ABLATIONS)}.")
_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the configuration, see dsv3_jax/configs.")
_SET = flags.DEFINE_multi_string("set", [], "Override of every variant: KEY=VALUE. Repeatable.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant, seeds 0, 1, ...")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablate", "Where the runs and the table are kept.")


def summarise(records: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, float]:
    """A number for every key of `COLUMNS`, from the metrics of a run and of the first variant's."""
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    violations = [r["max_violation"] for r in records if r["step"] > 0.9 * records[-1]["step"]]
    gaps = relative_gaps(*([r["loss"] for r in run] for run in (records, baseline)))
    return {
        "validation_loss": validation[-1],
        "max_violation": statistics.fmean(violations),
        "loss_gap": float(gaps[-1]),
    }


def table(results: Mapping[str, list[dict[str, float]]], columns: tuple[str, ...]) -> str:
    """Markdown rows: a variant, then its columns."""

    def cell(column: str, runs: list[dict[str, float]]) -> str:
        values = [run[column] for run in runs]
        spread = (max(values) - min(values)) / 2
        return " ± ".join(COLUMNS[column][1].format(x) for x in (statistics.fmean(values), spread))

    titles = [COLUMNS[column][0] for column in columns]
    rows = [["variant", *titles], ["---"] * (len(columns) + 1)]
    rows += [[name, *(cell(column, runs) for column in columns)] for name, runs in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    if _SEEDS.value < 1:
        raise UserError(f"--seeds={_SEEDS.value} is too small; it must be at least 1")
    if _VARIANTS.value not in ABLATIONS:
        raise UserError(
            f"--variants={_VARIANTS.value} is unknown;{did_you_mean(_VARIANTS.value, ABLATIONS)} "
            f"allowed: {', '.join(ABLATIONS)}"
        )
    from dsv3_jax.overrides import load_config
    from dsv3_jax.parallel.mesh import emulate_cpu_devices

    ablation = ABLATIONS[_VARIANTS.value]
    configs = {
        (variant, seed): load_config(
            _CONFIG.value, [*_SET.value, *overrides, f"run.seed={seed}", "run.num_samples=0"]
        )
        for variant, overrides in ablation.variants.items()
        for seed in range(_SEEDS.value)
    }
    emulate_cpu_devices(next(iter(configs.values())).parallel)
    from dsv3_jax.train.loop import train
    from dsv3_jax.train.metrics import METRICS_FILE, read_records

    root = Path(_WORKDIR.value)
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for (variant, seed), config in configs.items():
        folder = root / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"
        if stopped := train(config, folder):  # by a signal, after a save
            return stopped
        runs[variant, seed] = read_records(folder / METRICS_FILE)
    baseline = next(iter(ablation.variants))
    results: dict[str, list[dict[str, float]]] = {}
    for (variant, seed), records in runs.items():
        results.setdefault(variant, []).append(summarise(records, runs[baseline, seed]))
    (root / f"{_VARIANTS.value}.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results, ablation.columns))
    return 0


if __name__ == "__main__":
    run_main(main)

"""Trains variants of one configuration that differ in one choice, and prints a table.

    python -m experiments.ablate [--config=tiny] [--set KEY=VALUE]... [--seeds=3] [--workdir=DIR]

Variants: V3's loss-free balance, V2's auxiliary losses, no balance at all, and loss-free without
MTP. Every variant sees the same data and, seed by seed, the same initial numbers. The table gives
the validation loss of the main model and MaxVio at the end (mean over layers and over the last
tenth of the steps), each as mean and spread (half of max - min) over seeds. Runs that have ended
are not repeated: the command can be stopped and started again.
"""

import json
import statistics
from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

VARIANTS = {
    "loss-free balance, MTP": (),
    "auxiliary losses (V2), MTP": ("balance.method=auxiliary",),
    "no balance, MTP": ("balance.method=none",),
    "loss-free balance, no MTP": ("model.mtp_depth=0",),
}

_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the configuration, see dsv3_jax/configs.")
_SET = flags.DEFINE_multi_string("set", [], "Override of every variant: KEY=VALUE. Repeatable.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each variant, seeds 0, 1, ...")
_WORKDIR = flags.DEFINE_string("workdir", "runs/ablate", "Where the runs and the table are kept.")


def summarise(metrics_file: Path) -> dict[str, float]:
    """Final validation loss, and MaxVio over the last tenth of the steps, of one run."""
    records = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    validation = [r["validation_loss"] for r in records if "validation_loss" in r]
    violations = [r["max_violation"] for r in records if r["step"] > 0.9 * records[-1]["step"]]
    return {"validation_loss": validation[-1], "max_violation": statistics.fmean(violations)}


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown rows: variant, validation loss, MaxVio."""

    def cell(values: list[float]) -> str:
        spread = (max(values) - min(values)) / 2
        return f"{statistics.fmean(values):.4f} ± {spread:.4f}"

    lines = ["| variant | validation loss | MaxVio |", "|---|---|---|"]
    for variant, runs in results.items():
        losses = cell([run["validation_loss"] for run in runs])
        violations = cell([run["max_violation"] for run in runs])
        lines.append(f"| {variant} | {losses} | {violations} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    if _SEEDS.value < 1:
        raise UserError(f"--seeds={_SEEDS.value} is too small; it must be at least 1")
    from dsv3_jax.overrides import load_config
    from dsv3_jax.parallel.mesh import emulate_cpu_devices

    configs = {
        (variant, seed): load_config(
            _CONFIG.value, [*_SET.value, *overrides, f"run.seed={seed}", "run.num_samples=0"]
        )
        for variant, overrides in VARIANTS.items()
        for seed in range(_SEEDS.value)
    }
    emulate_cpu_devices(next(iter(configs.values())).parallel)
    from dsv3_jax.train.loop import train

    root = Path(_WORKDIR.value)
    results: dict[str, list[dict[str, float]]] = {}
    for (variant, seed), config in configs.items():
        folder = root / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"
        if stopped := train(config, folder):  # by a signal, after a save
            return stopped
        results.setdefault(variant, []).append(summarise(folder / "metrics.jsonl"))
    (root / "ablation.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    run_main(main)

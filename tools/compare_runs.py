"""How far a run is from another that differs in nothing but precision: loss and step time.

python -m tools.compare_runs BASELINE RUN [--figure=FILE.png]

Both are working directories, e.g. of a bfloat16 and of an FP8 run. Gaps are RUN / BASELINE - 1 of
training losses smoothed by an exponential moving average of 0.9 (spec §5.7). Exit code 2, with one
line: a directory holds no run, or the two differ in more than `precision`.
"""

import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from dsv3_jax.errors import UserError, run_main, some
from dsv3_jax.train.compare import DECAY, relative_gaps, smoothed

_FIGURE = flags.DEFINE_string("figure", None, "Where a PNG of both curves goes; default: none.")
_FREE = "precision."  # keys in which the runs may differ start so


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a working directory tells of a run."""

    path: Path
    config: Mapping[str, Any]  # 'group.key' -> value
    steps: list[int]
    losses: list[float]  # a step
    validation_loss: float | None  # the last
    tokens_per_second: float  # median


def read_run(path: Path) -> Run:
    """Reads run.json and metrics.jsonl.

    Raises:
      UserError: one of them is missing or empty.
    """
    from dsv3_jax.train.metrics import METRICS_FILE, read_records
    from dsv3_jax.train.workdir import RUN_FILE

    records = read_records(path / METRICS_FILE)
    if not records or not (path / RUN_FILE).is_file():
        missing = METRICS_FILE if not records else RUN_FILE
        raise UserError(f"{path / missing} holds no run; give the workdir of one")
    config = dict(_leaves(json.loads((path / RUN_FILE).read_text())["config"]))
    steps = [record["step"] for record in records]
    return Run(
        path=path,
        config=config,
        steps=steps,
        losses=[record["loss"] for record in records],
        validation_loss=next(
            (r["validation_loss"] for r in reversed(records) if "validation_loss" in r), None
        ),
        tokens_per_second=statistics.median(r["tokens_per_second"] for r in records),
    )


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def check_comparable(baseline: Run, run: Run) -> None:
    """Refuses runs that differ in anything but precision.

    Raises:
      UserError: names what differs.
    """
    ours, theirs = run.config, baseline.config
    differing = [
        f"{key}={theirs.get(key)} and {ours.get(key)}"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key) and not key.startswith(_FREE)
    ]
    if differing:
        raise UserError(
            f"{baseline.path} and {run.path} differ in {some(differing)}; "
            f"only precision may differ, so run one of them again"
        )
    if baseline.steps != run.steps:
        raise UserError(
            f"{baseline.path} ends with step {baseline.steps[-1]} and {run.path} with step "
            f"{run.steps[-1]}; let both run to the same step"
        )


def describe(baseline: Run, run: Run) -> str:
    """The comparison as a Markdown table. Warm-up is that of the learning rate."""
    gaps = relative_gaps(run.losses, baseline.losses)
    start = min(baseline.config["optim.warmup_steps"], len(gaps) - 1)
    worst = start + int(np.argmax(np.abs(gaps[start:])))
    rows = [
        (key, baseline.config.get(key), value, "")
        for key, value in run.config.items()
        if key.startswith(_FREE) and value != baseline.config.get(key)
    ]
    smooth_baseline, smooth_run = smoothed(baseline.losses), smoothed(run.losses)
    for what, step in (
        ("the end", -1),
        (f"the largest gap from step {run.steps[start]} on", worst),
    ):
        ours, theirs, gap = smooth_run[step], smooth_baseline[step], gaps[step]
        name = f"loss, EMA {DECAY}, step {run.steps[step]}: {what}"
        rows.append((name, f"{theirs:.4f}", f"{ours:.4f}", f"{gap:+.3%}"))
    ours, theirs = run.validation_loss, baseline.validation_loss
    if ours is not None and theirs is not None:
        rows.append(
            ("validation loss", f"{theirs:.4f}", f"{ours:.4f}", f"{ours / theirs - 1:+.3%}")
        )
    ours, theirs = run.tokens_per_second, baseline.tokens_per_second
    ratio = f"step time x {theirs / ours:.3f}"
    rows.append(("tokens a second, median", f"{theirs:,.0f}", f"{ours:,.0f}", ratio))
    header = (f"| | {baseline.path} | {run.path} | |", "|---|---|---|---|")
    return "\n".join((*header, *("| " + " | ".join(map(str, row)) + " |" for row in rows)))


def plot(baseline: Run, run: Run, output: Path) -> None:
    """Both smoothed curves, and the gap between them, as a PNG.

    Raises:
      UserError: the file cannot be written.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curves, gap) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    for side in (baseline, run):
        curves.plot(side.steps, smoothed(side.losses), linewidth=0.8, label=str(side.path))
    curves.set(title="training loss, EMA 0.9 (nats a token)")
    curves.legend()
    gap.plot(run.steps, 100 * relative_gaps(run.losses, baseline.losses), linewidth=0.8)
    gap.axhline(0, color="black", linewidth=0.5)
    gap.set(title=f"{run.path} over {baseline.path}, minus 1", xlabel="step", ylabel="%")
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--figure={output} cannot be written ({error.strerror})") from None
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) != 3:
        raise UserError("name two working directories: python -m tools.compare_runs BASELINE RUN")
    baseline, run = (read_run(Path(path)) for path in argv[1:])
    check_comparable(baseline, run)
    print(describe(baseline, run))
    if _FIGURE.value:
        plot(baseline, run, Path(_FIGURE.value))
        print(_FIGURE.value)


if __name__ == "__main__":
    run_main(main)

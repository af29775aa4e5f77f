"""Goodput (useful time over wall time) of a long run by checkpoint interval, simulated.

python -m tools.goodput [--chips=2048,100000] [--minutes=1,2,5,15,30,60,240] [--set KEY=VALUE]... \
    [--num_failures=N] [--seed=N] [--figure=FILE.png]

For every number of chips: the goodput at each interval, without and with slow nodes, beside the
closed form (Daly's, exact without slow nodes), and where the rest of the wall time goes. An
interval is time of steps, at full speed, from one save to the next. `--set` changes a field of
`dsv3_jax/plan/goodput.py:Cluster`, e.g. --set mtbf_hours=20000 --set blocking_seconds=2.
"""

import dataclasses
from collections.abc import Sequence

from absl import flags

from dsv3_jax.errors import UserError, did_you_mean, run_main
from dsv3_jax.plan import goodput

_CHIPS = flags.DEFINE_list("chips", ["2048", "100000"], "Sizes of the run.")
_MINUTES = flags.DEFINE_list("minutes", "1,2,5,15,30,60,240".split(","), "Intervals to show.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE of Cluster. Repeatable.")
_NUM_FAILURES = flags.DEFINE_integer("num_failures", 200_000, "Length of a run.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the failures.", lower_bound=0)
_FIGURE = flags.DEFINE_string("figure", None, "Draw goodput over interval into this PNG.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One number of chips, with the slow nodes that were asked for and without any."""

    cluster: goodput.Cluster
    history: goodput.History
    smooth_cluster: goodput.Cluster
    smooth_history: goodput.History


def make_run(cluster: goodput.Cluster) -> Run:
    def draw(of: goodput.Cluster) -> goodput.History:
        return goodput.draw_history(of, num_failures=_NUM_FAILURES.value, seed=_SEED.value)

    smooth = dataclasses.replace(cluster, slow_fraction=0.0)
    return Run(
        cluster=cluster,
        history=draw(cluster),
        smooth_cluster=smooth,
        smooth_history=draw(smooth),
    )


def report(run: Run, intervals: Sequence[float]) -> list[str]:
    """Lines about one run; `intervals` in seconds, Daly's is added."""
    cluster, daly = run.cluster, goodput.daly_interval(run.cluster)
    lines = [
        f"{cluster.chips:,} chips: a failure every {cluster.mtbf_seconds / 3600:.2f} h, "
        f"{cluster.restart_seconds:.0f} s a restart; a save blocks {cluster.blocking_seconds:g} s "
        f"and is committed after {cluster.save_seconds:g} s",
        " interval  no slow nodes  closed form  goodput  saving    lost  restart  straggling",
    ]
    for interval in sorted({*intervals, daly}):
        smooth = goodput.simulate(run.smooth_cluster, run.smooth_history, interval)
        found = goodput.simulate(cluster, run.history, interval)
        waits = interval < cluster.behind_seconds  # for the save before: no closed form
        closed = "-" if waits else f"{goodput.expected_goodput(cluster, interval):.2%}"
        lines.append(
            f"{interval / 60:5.1f} min  {smooth.useful:7.2%} ±{smooth.useful_error:5.2%}"
            f"  {closed:>11}  {found.useful:7.2%}  {found.saving:6.2%}  {found.lost:6.2%}"
            f"  {found.restarting:7.2%}  {found.straggling:10.2%}"
            + ("  <- Daly's interval" if interval == daly else "")
        )
    smooth_best = goodput.best_interval(run.smooth_cluster, run.smooth_history)
    best = goodput.best_interval(cluster, run.history)
    return [
        *lines,
        f"best interval: simulated {smooth_best:.1f} s, Daly {daly:.1f} s "
        f"({smooth_best / daly - 1:+.2%}), Young {goodput.young_interval(cluster):.1f} s; "
        f"with slow nodes {best:.1f} s",
    ]


def draw(runs: Sequence[Run], path: str) -> None:
    """Goodput over interval: closed form as lines, simulated as points."""
    import matplotlib
    import numpy as np

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for number, run in enumerate(runs):
        color, mtbf = f"C{number}", run.cluster.mtbf_seconds
        low = max(run.cluster.behind_seconds, mtbf / 1e4)
        intervals = np.geomspace(low, 2 * max(mtbf, low), 25)
        closed = [goodput.expected_goodput(run.cluster, i) for i in intervals]
        smooth = [goodput.simulate(run.smooth_cluster, run.smooth_history, i) for i in intervals]
        found = [goodput.simulate(run.cluster, run.history, i) for i in intervals]
        chips = f"{run.cluster.chips:,} chips"
        axes.plot(intervals / 60, closed, color=color, label=f"{chips}, closed form")
        axes.plot(
            intervals / 60, [g.useful for g in smooth], "o", color=color, markersize=4,
            label=f"{chips}, simulated",
        )  # fmt: skip
        axes.plot(
            intervals / 60, [g.useful for g in found], "x", color=color, markersize=4,
            label=f"{chips}, with slow nodes",
        )  # fmt: skip
        daly = goodput.daly_interval(run.cluster)
        axes.axvline(daly / 60, color=color, linestyle=":", linewidth=1)
    axes.set(
        xscale="log", ylim=(0, 1), xlabel="minutes of steps between saves (dotted: Daly's optimum)",
        ylabel="goodput",
    )  # fmt: skip
    axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=100)
    except OSError as error:
        raise UserError(f"--figure={path} cannot be written: {error.strerror}") from None


def _overrides(assignments: Sequence[str]) -> dict[str, float]:
    known = [f.name for f in dataclasses.fields(goodput.Cluster) if f.name != "chips"]
    values = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key not in known:
            raise UserError(
                f"--set {key} is unknown;{did_you_mean(key, known)} allowed: {', '.join(known)}"
            )
        values[key] = _number(f"--set {key}", text)
    return values


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{what}={text!r} must be a number") from None


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; fields are written --set KEY=VALUE")
    values = _overrides(_SET.value)
    intervals = [60 * _number("--minutes", text) for text in _MINUTES.value]
    if not all(0 < interval < float("inf") for interval in intervals):
        raise UserError(f"--minutes={','.join(_MINUTES.value)} must be above 0")
    chips = [_number("--chips", text) for text in _CHIPS.value]
    if not all(count.is_integer() for count in chips):
        raise UserError(f"--chips={','.join(_CHIPS.value)} must be whole numbers")
    runs = [make_run(goodput.Cluster(chips=int(count), **values)) for count in chips]
    print("\n\n".join("\n".join(report(run, intervals)) for run in runs))
    if _FIGURE.value is not None:
        draw(runs, _FIGURE.value)
        print(f"\nwrote {_FIGURE.value}")


if __name__ == "__main__":
    run_main(main)

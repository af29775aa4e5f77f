"""Results beside the published ones, as a table or as JSON."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dsv3_jax.evals.published import BASE, BITS_PER_BYTE, CHAT
from dsv3_jax.evals.run import Outcome
from dsv3_jax.evals.tasks import TASKS

if TYPE_CHECKING:  # it needs JAX
    from dsv3_jax.evals.needle import Needles
    from dsv3_jax.evals.perplexity import TextScore


def as_json(
    outcomes: Mapping[str, Outcome],
    texts: "Mapping[str, TextScore]",
    chat: bool,
    needles: "Needles | None" = None,
) -> dict[str, Any]:
    """Every number of a run; scores are percent, as the report gives them."""
    return {
        "tasks": [_task(name, outcome, chat) for name, outcome in outcomes.items()],
        "texts": [
            {
                "file": name,
                "bytes": score.num_bytes,
                "tokens": score.num_tokens,
                "bits_per_byte": score.bits_per_byte,
                "perplexity": score.perplexity,
            }
            for name, score in texts.items()
        ],
        "needle": needles and _needle(needles),
    }


def _needle(needles: "Needles") -> dict[str, Any]:
    return {
        "lengths": needles.grid.lengths,
        "depths": needles.grid.depths,
        "mean": needles.mean,
        "mean_at_length": [needles.at(length) for length in needles.grid.lengths],
        "scores": np.where(np.isnan(needles.scores), None, needles.scores).tolist(),
        "failures": needles.failures,
    }


def _task(name: str, outcome: Outcome, chat: bool) -> dict[str, Any]:
    published = (CHAT if chat else BASE).get(name)
    return {
        "task": name,
        "items": outcome.num_items,
        "shots": outcome.shots,
        "score": 100 * outcome.score,
        "interval": [100 * bound for bound in outcome.interval],
        "pass_at": {str(k): 100 * value for k, value in outcome.pass_at.items()},
        "failures": outcome.failures,
        "cut": outcome.num_cut,
        "published": None
        if published is None
        else {
            "scores": published.scores,
            "shots": published.shots,
            "benchmark": published.benchmark or TASKS[name].title,
        },
    }


def print_tables(results: Mapping[str, Any], console: Console) -> None:
    """Shows what `as_json` gives."""
    if results["tasks"]:
        console.print(_task_table(results["tasks"]))
        for line in _notes(results["tasks"]):
            console.print(line, style="dim", highlight=False)
    if results["needle"]:
        console.print(_needle_table(results["needle"]))
    if results["texts"]:
        console.print(_text_table(results["texts"]))


def _needle_table(needle: Mapping[str, Any]) -> Table:
    table = Table(title=f"Needle in a haystack: mean {needle['mean']:.3f}; published: 1 everywhere")
    table.add_column("tokens")
    for length in needle["lengths"]:
        table.add_column(f"{length:,}", justify="right")
    table.add_row("score", *(f"{value:.2f}" for value in needle["mean_at_length"]))
    return table


def _task_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    models: dict[str, None] = {}  # in the order of the report
    for task in tasks:
        models.update(dict.fromkeys((task["published"] or {"scores": {}})["scores"]))
    ks = sorted({int(k) for task in tasks for k in task["pass_at"]} - {1})
    table = Table(title="Scores, percent; published ones from the DeepSeek-V3 report")
    table.add_column("benchmark")
    for heading in ("items", "shots", "score", "95 % interval", *(f"pass@{k}" for k in ks)):
        table.add_column(heading, justify="right")
    table.add_column("failed", justify="right")
    for model in models:
        table.add_column(model, justify="right")
    for task in tasks:
        low, high = task["interval"]
        published = task["published"] or {"scores": {}}
        mark = "*" if task["published"] and _differs(task) else ""
        table.add_row(
            TASKS[task["task"]].title,
            f"{task['items']:,}",
            str(task["shots"]),
            f"{task['score']:.1f}",
            f"{low:.1f} to {high:.1f}",
            *(f"{task['pass_at'][str(k)]:.1f}" for k in ks),
            f"{sum(task['failures'].values()):,}",
            *(_score(published["scores"].get(model), mark) for model in models),
        )
    return table


def _score(value: float | None, mark: str) -> str:
    return "-" if value is None else f"{value:.1f}{mark}"


def _differs(task: Mapping[str, Any]) -> bool:
    """Whether the published score is of something else."""
    published = task["published"]
    other_shots = published["shots"] not in (None, task["shots"])
    return other_shots or published["benchmark"] != TASKS[task["task"]].title


def _notes(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    notes = []
    for task in tasks:
        title = TASKS[task["task"]].title
        if task["failures"]:
            reasons = ", ".join(f"{why} {count:,}" for why, count in task["failures"].items())
            notes.append(f"{title}: failed, and so counted as wrong: {reasons}.")
        if task["cut"]:
            notes.append(f"{title}: {task['cut']:,} answers ran into --max_tokens.")
        if task["published"] and _differs(task):
            published = task["published"]
            shots = "" if published["shots"] is None else f", {published['shots']} shots"
            notes.append(f"* {title}: published for {published['benchmark']}{shots}.")
    return notes


def _text_table(texts: Sequence[Mapping[str, Any]]) -> Table:
    pile = ", ".join(f"{model} {value}" for model, value in BITS_PER_BYTE.items())
    table = Table(title=f"Texts; published bits per byte, Pile test set: {pile}")
    table.add_column("file")
    for heading in ("bytes", "tokens", "bits per byte", "perplexity"):
        table.add_column(heading, justify="right")
    for text in texts:
        table.add_row(
            text["file"],
            f"{text['bytes']:,}",
            f"{text['tokens']:,}",
            f"{text['bits_per_byte']:.4f}",
            f"{text['perplexity']:.3f}",
        )
    return table

"""Runs benchmarks on a checkpoint or a server, and shows the published DeepSeek-V3 scores beside.

    python -m experiments.evaluate --endpoint=http://127.0.0.1:8000/v1 --chat
        --task=math500=MATH500.jsonl --task=humaneval=HumanEval.jsonl.gz
    python -m experiments.evaluate --checkpoint=runs/tiny --text=held_out.txt
        --task=gsm8k=gsm8k_test.jsonl --examples=gsm8k=gsm8k_train.jsonl --limit=100
    python -m experiments.evaluate --checkpoint=DIR --needle --needle_tokens=131072

Files are the ones that the benchmarks are published as. Exit codes: 0 done, 2 a mistake in the
call, a server that is not there, or too many failures (one line).
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from dsv3_jax.errors import UserError, did_you_mean, run_main

if TYPE_CHECKING:
    from rich.console import Console

    from dsv3_jax.evals.endpoint import Endpoint
    from dsv3_jax.evals.needle import Needles
    from dsv3_jax.evals.perplexity import TextScore
    from dsv3_jax.evals.run import Outcome, Settings

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Working directory of a run, or a Hugging Face folder."
)
_ENDPOINT = flags.DEFINE_string("endpoint", None, "An OpenAI-compatible server: its URL.")
_MODEL_NAME = flags.DEFINE_string("model_name", None, "At the endpoint; default: its first.")
_API_KEY_ENV = flags.DEFINE_string(
    "api_key_env", None, "Environment variable with the endpoint's key."
)
_TASK = flags.DEFINE_multi_string(
    "task",
    [],
    "NAME=FILE, repeatable; gsm8k, math500, mmlu_pro, gpqa_diamond, humaneval, or problems: your "
    "own, an object {prompt, answer} a line, right when the answer is that and nothing else.",
)
_EXAMPLES = flags.DEFINE_multi_string(
    "examples", [], "NAME=FILE with the examples of few-shot prompts, repeatable."
)
_TEXT = flags.DEFINE_multi_string(
    "text", [], "File whose bits per byte and perplexity are measured, repeatable."
)
_NEEDLE = flags.DEFINE_bool("needle", False, "Needle in a haystack, a grid of lengths and depths.")
_NEEDLE_TOKENS = flags.DEFINE_integer(
    "needle_tokens", 131072, "Of the longest haystack.", lower_bound=64
)
_NEEDLE_CELLS = flags.DEFINE_integer("needle_cells", 15, "Lengths, and depths.", lower_bound=1)
_NEEDLE_DIGITS = flags.DEFINE_integer("needle_digits", 4, "Of a number.", lower_bound=1)
_HAYSTACK = flags.DEFINE_string("haystack", None, "Text file with the haystack's sentences.")
_CHAT = flags.DEFINE_bool("chat", False, "Ask in conversations; else texts are continued.")
_SHOTS = flags.DEFINE_integer(
    "shots", None, "Examples before each question; default: the task's.", lower_bound=0
)
_LIMIT = flags.DEFINE_integer("limit", None, "Items of each task, the first ones.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer(
    "samples", 1, "Answers to each item, or needles of a cell.", lower_bound=1
)
_PASS_K = flags.DEFINE_list("pass_k", ["1"], "k of pass@k, comma-separated; at most --samples.")
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "0 takes the most likely token each time.", lower_bound=0.0
)
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Of the sampling.", lower_bound=0.0, upper_bound=1.0)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", None, "Of an answer; default: the task's.", lower_bound=1
)
_MAX_FAILURES = flags.DEFINE_integer(
    "max_failures", 20, "Answers of a task that may fail; more stop the run.", lower_bound=0
)
_TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds", 120.0, "For an answer of the endpoint.", lower_bound=0.001
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Calls at once.", lower_bound=1)
_CONTEXT_TOKENS = flags.DEFINE_integer(
    "context_tokens", 4096, "Prompt and answer, and a window of --text.", lower_bound=2
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of a checkpoint's arithmetic."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "Of the results.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for each answer: TASK.jsonl.")


_ANSWER_TOKENS = 64  # after a haystack


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --task=NAME=FILE")
    if (_CHECKPOINT.value is None) == (_ENDPOINT.value is None):
        raise UserError("give either --checkpoint=DIR or --endpoint=URL")
    if not _TASK.value and not _TEXT.value and not _NEEDLE.value:
        raise UserError("nothing to do; give --task=NAME=FILE, --text=FILE or --needle")
    if _NEEDLE.value and _CHECKPOINT.value is None:
        raise UserError("--needle counts tokens, for which it needs --checkpoint=DIR")
    if _TEXT.value and _ENDPOINT.value is not None:
        raise UserError("--text needs probabilities, which no endpoint tells; use --checkpoint=DIR")
    from rich.console import Console

    from dsv3_jax.evals.tasks import TASKS

    # Mistakes are found before the weights, which take long.
    settings = read_settings()
    items = {
        name: TASKS[name].items(file)[: _LIMIT.value]
        for name, file in named_files("task", _TASK.value).items()
    }
    examples = {
        name: TASKS[name].items(file)
        for name, file in named_files("examples", _EXAMPLES.value).items()
    }
    texts = {name: read_text(name) for name in _TEXT.value}
    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    # Progress goes to stderr, so that stdout is the result alone.
    console = Console(stderr=True)
    endpoint = make_endpoint()
    outcomes = {}
    for name, some in items.items():
        outcomes[name] = run_task(name, some, examples.get(name, ()), endpoint, settings, console)
        if output is not None:
            write_marks(output / f"{name}.jsonl", some, outcomes[name])
    needles = find_needles(endpoint, output) if _NEEDLE.value else None
    show(outcomes, score_texts(endpoint, texts), needles)


def read_settings() -> "Settings":
    from dsv3_jax.evals.run import Settings

    try:
        ks = tuple(sorted({int(k) for k in _PASS_K.value}))
    except ValueError:
        ks = ()
    if not ks or ks[0] < 1 or ks[-1] > _SAMPLES.value:
        raise UserError(
            f"--pass_k={','.join(_PASS_K.value)} must be whole numbers from 1 to "
            f"--samples={_SAMPLES.value}"
        )
    if _TASK.value and _SAMPLES.value > 1 and not _TEMPERATURE.value:
        raise UserError(
            f"--samples={_SAMPLES.value} at --temperature=0 are all the same; give e.g. "
            "--temperature=0.7"
        )
    return Settings(
        chat=_CHAT.value,
        shots=_SHOTS.value,
        num_samples=_SAMPLES.value,
        ks=ks,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
        max_tokens=_MAX_TOKENS.value,
        max_failures=_MAX_FAILURES.value,
        seed=_SEED.value,
    )


def named_files(flag: str, values: list[str]) -> dict[str, str]:
    """`NAME=FILE` by name."""
    from dsv3_jax.evals.tasks import TASKS

    files = {}
    for value in values:
        name, equals, file = value.partition("=")
        if name not in TASKS or not equals:
            raise UserError(
                f"--{flag}={value!r} must be NAME=FILE;{did_you_mean(name, TASKS)} names are "
                f"{', '.join(TASKS)}"
            )
        files[name] = file
    return files


def read_text(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--text={name} cannot be read ({reason}); give a UTF-8 file") from error


def make_endpoint() -> "Endpoint":
    if _CHECKPOINT.value is not None:
        from dsv3_jax.evals.local import load_endpoint

        return load_endpoint(
            _CHECKPOINT.value,
            dtype=_DTYPE.value,
            context_tokens=max(
                _CONTEXT_TOKENS.value, _NEEDLE.value and _NEEDLE_TOKENS.value + _ANSWER_TOKENS
            ),
        )
    from dsv3_jax.evals.endpoint import HttpEndpoint, HttpOptions, key_from_environment

    key = key_from_environment("--api_key_env", _API_KEY_ENV.value)
    options = HttpOptions(timeout_seconds=_TIMEOUT_SECONDS.value, concurrency=_CONCURRENCY.value)
    return HttpEndpoint(_ENDPOINT.value, _MODEL_NAME.value, key, options)


def run_task(
    name: str, items: list, examples: list, endpoint: "Endpoint", settings: "Settings",
    console: "Console",
) -> "Outcome":  # fmt: skip
    from rich.progress import Progress

    from dsv3_jax.evals.run import evaluate
    from dsv3_jax.evals.tasks import TASKS

    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(TASKS[name].title, total=None)
        return evaluate(
            TASKS[name],
            items,
            endpoint,
            settings,
            examples,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )


def find_needles(endpoint: "Endpoint", output: Path | None) -> "Needles":
    """Also draws the heat map, `needle.png`, into `output`."""
    from dsv3_jax.evals.needle import Grid, Maker, draw, run, sentences_of

    needles = run(
        endpoint,
        Maker(endpoint.tokenizer, sentences_of(_HAYSTACK.value), _NEEDLE_DIGITS.value),
        Grid.up_to(_NEEDLE_TOKENS.value, _NEEDLE_CELLS.value),
        samples=_SAMPLES.value,
        seed=_SEED.value,
        chat=_CHAT.value,
        max_failures=_MAX_FAILURES.value,
    )
    if output is not None:
        draw(needles, output / "needle.png", str(_CHECKPOINT.value))
    return needles


def score_texts(endpoint: "Endpoint", texts: dict[str, str]) -> "dict[str, TextScore]":
    if not texts:
        return {}
    from dsv3_jax.evals.perplexity import Scorer, score_text

    scorer = Scorer(endpoint.model, _CONTEXT_TOKENS.value)
    return {name: score_text(scorer, endpoint.tokenizer, text) for name, text in texts.items()}


def write_marks(path: Path, items: list, outcome: "Outcome") -> None:
    """One object an answer, with the question and what would have been right."""
    with path.open("w", encoding="utf-8") as file:
        for mark in outcome.marks:
            item = items[mark.item]
            shown = {"question": item.question, "reference": item.reference}
            file.write(json.dumps({**dataclasses.asdict(mark), **shown}) + "\n")


def show(
    outcomes: "dict[str, Outcome]", texts: "dict[str, TextScore]", needles: "Needles | None"
) -> None:
    from rich.console import Console

    from dsv3_jax.evals.report import as_json, print_tables

    results = as_json(outcomes, texts, _CHAT.value, needles)
    if _FORMAT.value == "json":
        json.dump(results, sys.stdout, indent=2)
        print()
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=160)
    print_tables(results, console)


if __name__ == "__main__":
    run_main(main)

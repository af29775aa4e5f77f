"""Makes fine-tuning records of a teacher's verified answers (spec §10.1, §10.4).

    python -m experiments.distill --endpoint=URL --problems=FILE.jsonl --workdir=DIR
    python -m experiments.distill --checkpoint=runs/teacher --problems=FILE.jsonl --workdir=DIR
    python -m experiments.sft --set checkpoint.initial_weights=runs/student
        --set sft.conversations=DIR/records.jsonl

A line of FILE is {"prompt": text or messages, "answer": what the reward compares with}, and may
hold an original "response". The same command goes on where it was stopped. Exit codes: 0 done, 2 a
mistake in the call or a teacher that failed too often (one line).
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_PROBLEMS = flags.DEFINE_string("problems", None, "JSONL file, folder or glob.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "runs/distill", "Answers and records.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "The teacher: a run or a folder.")
_ENDPOINT = flags.DEFINE_string("endpoint", None, "The teacher: an OpenAI-compatible server's URL.")
_MODEL_NAME = flags.DEFINE_string("model_name", None, "At the endpoint; default: its first.")
_API_KEY_ENV = flags.DEFINE_string(
    "api_key_env", None, "Environment variable with the endpoint's key."
)
_REWARD = flags.DEFINE_string("reward", "boxed", "What verifies: exact, boxed or code.")
_SAMPLES = flags.DEFINE_integer("samples", 4, "Answers to each problem.", lower_bound=1)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 1024, "Of an answer.", lower_bound=1)
_MAX_CHARACTERS = flags.DEFINE_integer(
    "max_characters", 20_000, "Of an answer that is kept.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.7, "Of the sampling.", lower_bound=0.0)
_SYSTEM = flags.DEFINE_string("system", None, "System prompt; default: reflect and verify.")
_CONTEXT_TOKENS = flags.DEFINE_integer(
    "context_tokens", 4096, "Prompt and answer of a checkpoint.", lower_bound=2
)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 8, "Calls at once.", lower_bound=1)
_TIMEOUT_SECONDS = flags.DEFINE_float(
    "timeout_seconds", 120.0, "For an answer of the endpoint.", lower_bound=0.001
)
_MAX_FAILED = flags.DEFINE_float(
    "max_failed_fraction", 0.1, "Answers that may fail to come.", lower_bound=0, upper_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --NAME=VALUE")
    if (_CHECKPOINT.value is None) == (_ENDPOINT.value is None):
        raise UserError("give either --checkpoint=DIR or --endpoint=URL")
    from rich.console import Console
    from rich.progress import Progress

    from dsv3_jax.errors import did_you_mean
    from dsv3_jax.evals.failures import Failures
    from dsv3_jax.posttrain.distill import RECORDS_FILE, SYSTEM, DistillOptions, distill
    from dsv3_jax.posttrain.distill import read_questions as read
    from dsv3_jax.posttrain.problems import REWARDS
    from dsv3_jax.posttrain.records import read_lines

    if _REWARD.value not in REWARDS:
        raise UserError(
            f"--reward={_REWARD.value} is unknown;{did_you_mean(_REWARD.value, REWARDS)} "
            f"allowed: {', '.join(REWARDS)}"
        )
    lines = read_lines("--problems", _PROBLEMS.value)
    failures = Failures(f"--problems={_PROBLEMS.value}", len(lines) // 100, "mend the file")
    questions = read(lines, failures)
    options = DistillOptions(
        samples=_SAMPLES.value,
        max_tokens=_MAX_TOKENS.value,
        temperature=_TEMPERATURE.value,
        max_characters=_MAX_CHARACTERS.value,
        max_failed_fraction=_MAX_FAILED.value,
        system=SYSTEM if _SYSTEM.value is None else _SYSTEM.value,
        seed=_SEED.value,
    )
    teacher, workdir = make_teacher(), Path(_WORKDIR.value)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("problems", total=None)
        result = distill(
            questions,
            teacher,
            REWARDS[_REWARD.value](),
            workdir,
            options,
            lambda done, total: progress.update(bar, completed=done, total=total),
        )
    if failures.total:
        print(f"left out of {_PROBLEMS.value}: {failures}")
    print(f"{result}\n{workdir / RECORDS_FILE}")


def make_teacher():
    from dsv3_jax.evals.endpoint import HttpEndpoint, HttpOptions, key_from_environment

    if _CHECKPOINT.value is not None:
        from dsv3_jax.evals.local import load_endpoint

        return load_endpoint(_CHECKPOINT.value, context_tokens=_CONTEXT_TOKENS.value, max_rows=32)
    options = HttpOptions(timeout_seconds=_TIMEOUT_SECONDS.value, concurrency=_CONCURRENCY.value)
    key = key_from_environment("--api_key_env", _API_KEY_ENV.value)
    return HttpEndpoint(_ENDPOINT.value, _MODEL_NAME.value, key, options)


if __name__ == "__main__":
    run_main(main)

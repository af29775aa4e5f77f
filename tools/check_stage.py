"""Says what a stage of a recipe improved, and fails where it did not.

    python -m tools.check_stage --name='needle at 512 tokens' --before=before.json:needle.mean
        --after=after.json:needle.mean --before_below=0.3 --after_at_least=0.9
    python -m tools.check_stage --name='held-out loss' --before=runs/a/metrics.jsonl:validation_loss
        --after=runs/a/metrics.jsonl:validation_loss --less_is_better

A measure is FILE:KEY. Of a JSON file KEY is a path of names and numbers (-1: the last). Of a JSONL
file it is a key of its lines: the mean over the first `--window` that have it for `--before`, the
last ones for `--after`. Without a bound, `--after` must be better. Exit codes: 0 improved, 1 not,
2 a mistake in the call or a file without the measure (one line).
"""

import json
import math
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax.errors import UserError, run_main

_NAME = flags.DEFINE_string("name", None, "What is measured.", required=True)
_BEFORE = flags.DEFINE_string("before", None, "FILE:KEY before the stage.", required=True)
_AFTER = flags.DEFINE_string("after", None, "FILE:KEY after it.", required=True)
_WINDOW = flags.DEFINE_integer("window", 1, "Lines of JSONL files.", lower_bound=1)
_LESS = flags.DEFINE_bool("less_is_better", False, "As of a loss.")
_BEFORE_BELOW = flags.DEFINE_float("before_below", None, "What the measure was below.")
_AFTER_ABOVE = flags.DEFINE_float("after_above", None, "What it must be above.")
_AFTER_AT_LEAST = flags.DEFINE_float("after_at_least", None, "What it must be at least.")
_GAIN = flags.DEFINE_float("gain", None, "By how much it must have risen.")
_REPORT_ONLY = flags.DEFINE_bool("report_only", False, "Show the measures, require nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --NAME=VALUE")
    before = measure("--before", _BEFORE.value, first=True)
    after = measure("--after", _AFTER.value, first=False)
    shown = f"{_NAME.value}: {before:.4g} -> {after:.4g}"
    if _REPORT_ONLY.value:
        print(shown)
        return 0
    missed = [wanted for wanted, holds in bounds(before, after) if not holds]
    print(f"{shown}: " + (f"FAILED, {', '.join(missed)}" if missed else "ok"), flush=True)
    return 1 if missed else 0


def bounds(before: float, after: float) -> list[tuple[str, bool]]:
    """What is wanted, in words, and whether it holds."""
    wanted = []
    for flag, words, holds in (
        (_BEFORE_BELOW, "before: below", lambda bound: before < bound),
        (_AFTER_ABOVE, "after: above", lambda bound: after > bound),
        (_AFTER_AT_LEAST, "after: at least", lambda bound: after >= bound),
        (_GAIN, "gain: at least", lambda bound: after - before >= bound),
    ):
        if flag.value is not None:
            wanted.append((f"{words} {flag.value:g}", holds(flag.value)))
    if not wanted and _LESS.value:
        return [("less than before", after < before)]
    return wanted or [("more than before", after > before)]


def measure(flag: str, value: str, *, first: bool) -> float:
    """The number that FILE:KEY names."""
    file, colon, key = value.rpartition(":")
    if not colon:
        raise UserError(f"{flag}={value} must be FILE:KEY")
    try:
        text = Path(file).read_text(encoding="utf-8")
        if file.endswith(".jsonl"):
            lines = map(json.loads, text.splitlines())
            found = [line[key] for line in lines if line.get(key) is not None]
            chosen = found[: _WINDOW.value] if first else found[-_WINDOW.value :]
            number = sum(chosen) / len(chosen)
        else:
            number = float(at(json.loads(text), key))
    except (OSError, ValueError, TypeError, LookupError, ZeroDivisionError) as error:
        raise UserError(
            f"{flag}: {file} has no number at {key} ({error!r}); did the stage before it run?"
        ) from None
    if not math.isfinite(number):
        raise UserError(f"{flag}: {key} of {file} is {number}; see what the stage wrote")
    return number


def at(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


if __name__ == "__main__":
    run_main(main)

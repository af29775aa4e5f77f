"""Prints a pipeline schedule: the order of chunks on every rank, as data or as a picture.

python -m tools.pipeline_schedule --schedule={dualpipe,dualpipev,zb1p,1f1b} --ranks=P \
    --microbatches=M [--format={json,text,svg}] [--output=FILE]

JSON: {"schedule", "ranks", "microbatches", "programs": [[step, ...] per rank]}; a step is a list of
one op, or of two that overlap; an op is {"kind", "direction", "microbatch"}, kind F forward, B full
backward, Bi input gradients only, W queued weight gradients. Micro-batches are numbered from 0
within their direction. Text and SVG show the simulated times for F = 1, B = 2, W = 1, F&B = 3.
"""

import json
from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_SCHEDULE = flags.DEFINE_string("schedule", "dualpipe", "dualpipe, dualpipev, zb1p or 1f1b.")
_RANKS = flags.DEFINE_integer("ranks", 8, "Pipeline ranks, parallel.pipe.")
_MICROBATCHES = flags.DEFINE_integer("microbatches", 20, "Micro-batches, all directions together.")
_FORMAT = flags.DEFINE_enum("format", "json", ["json", "text", "svg"], "What to print.")
_OUTPUT = flags.DEFINE_string("output", None, "Write to this file instead of printing.")


def main(argv: list[str]) -> None:
    del argv
    from dsv3_jax.parallel.pipeline.draw import to_svg, to_text
    from dsv3_jax.parallel.pipeline.schedules import make_schedule, to_json

    schedule = make_schedule(_SCHEDULE.value, _RANKS.value, _MICROBATCHES.value)
    formats = {"json": lambda s: json.dumps(to_json(s)), "text": to_text, "svg": to_svg}
    text = formats[_FORMAT.value](schedule)
    if _OUTPUT.value is None:
        print(text)
        return
    try:
        Path(_OUTPUT.value).write_text(text + "\n")
    except OSError as error:
        raise UserError(f"--output={_OUTPUT.value} cannot be written: {error.strerror}") from error
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    run_main(main)

"""Writes texts that teach a small model to retrieve: needles in a haystack, then the same again.

    python -m tools.make_needles --output=needles.jsonl [--documents=20000] [--sentences=8]
        [--needles=2] [--digits=2] [--haystack=FILE]

Train with `--set data.sources=jsonl:needles.jsonl`; `experiments.evaluate --needle` asks in the
same words. Many needles among few sentences are what retrieval is learnt from; few among many are
long texts. Without a file the haystack is made of sentences of our own.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax.errors import UserError, run_main
from dsv3_jax.evals.needle import CITIES, practice, sentences_of

_OUTPUT = flags.DEFINE_string("output", None, "JSONL file to write.", required=True)
_DOCUMENTS = flags.DEFINE_integer("documents", 20000, "Texts to write.", lower_bound=1)
_SENTENCES = flags.DEFINE_integer("sentences", 8, "Most sentences of a haystack.", lower_bound=1)
_NEEDLES = flags.DEFINE_integer(
    "needles", 2, "Most needles of a text.", lower_bound=1, upper_bound=len(CITIES)
)
_DIGITS = flags.DEFINE_integer("digits", 2, "Of a number.", lower_bound=1)
_HAYSTACK = flags.DEFINE_string("haystack", None, "Text file with the haystack's sentences.")
_SEED = flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --NAME=VALUE")
    rng, sentences = np.random.default_rng(_SEED.value), sentences_of(_HAYSTACK.value)
    output = Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        for _ in range(_DOCUMENTS.value):
            size = int(rng.integers(1, _SENTENCES.value + 1))
            count = int(rng.integers(1, _NEEDLES.value + 1))
            text = practice(rng, sentences, size, count, _DIGITS.value)
            file.write(json.dumps({"text": text}) + "\n")
    print(f"{_DOCUMENTS.value:,} texts in {output}")


if __name__ == "__main__":
    run_main(main)

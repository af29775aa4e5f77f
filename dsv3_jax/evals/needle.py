"""Needle in a haystack (spec §9): a fact hidden at a depth of a long text, asked for at its end.

A cell of the grid is a length and a depth; its score is the share of needles whose number comes
back. The published grid is 15 lengths from 2K to 128K tokens by 15 depths, each cell scored 1 to
10; ours reports 0 to 1, where 1 is their 10.
"""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Endpoint, SamplingOptions
from dsv3_jax.evals.failures import Failures

NEEDLE = "The secret number of {city} is {number}."
QUESTION = "The secret number of {city} is"
CITIES = (
    *("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Paris", "Tokyo", "Quito"),
    *("Accra", "Dakar", "Hanoi", "Milan", "Perth", "Sofia", "Turin", "Tunis"),
)


_HAYSTACK = (
    *("The river runs past the mill.", "A cat sleeps on the warm stones."),
    *("Rain falls on the market square.", "The baker opens before the sun."),
    *("Two boats wait at the old pier.", "Her garden is full of red roses."),
    *("The train left without a sound.", "Snow covers the hills in winter."),
    *("He reads the paper every morning.", "The bridge was built of oak."),
    *("Children play near the fountain.", "A letter came from far away."),
)


def sentences_of(path: str | None) -> list[str]:
    """Sentences of a text file; None: some of our own.

    Raises:
      UserError: the file cannot be read, or holds none.
    """
    if path is None:
        return list(_HAYSTACK)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"haystack {path} cannot be read ({reason}); give a UTF-8 file") from None
    sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    if not sentences:
        raise UserError(f"haystack {path} holds no sentence; give a file with some text")
    return sentences


@dataclass(frozen=True)
class Grid:
    """Lengths in tokens, of the whole prompt; depths as shares of the haystack, 0 its start."""

    lengths: tuple[int, ...] = tuple(1024 * (2 + 9 * i) for i in range(15))
    depths: tuple[float, ...] = tuple(i / 14 for i in range(15))

    @classmethod
    def up_to(cls, tokens: int, size: int = 15) -> "Grid":
        """`size` x `size` cells, the longest of `tokens`."""
        lengths = np.linspace(tokens / size, tokens, size).astype(int)
        depths = np.linspace(0.0, 1.0, size)
        return cls(tuple(map(int, lengths)), tuple(map(float, depths)))


@dataclass(frozen=True)
class Needles:
    """Scores [depths, lengths] of a grid, NaN where no answer came, and why."""

    grid: Grid
    scores: np.ndarray
    failures: str

    @property
    def mean(self) -> float:
        return float(np.nanmean(self.scores))

    def at(self, length: int) -> float:
        """Mean over the depths of one length."""
        return float(np.nanmean(self.scores[:, self.grid.lengths.index(length)]))


@dataclass(frozen=True)
class Maker:
    """Prompts of a grid's cells.

    Attributes:
      sentences: of the haystack, repeated as often as a length needs.
      digits: of a number.
    """

    tokenizer: Tokenizer
    sentences: Sequence[str]
    digits: int = 4
    question: str = QUESTION
    _sizes: list[int] = field(init=False)

    def __post_init__(self):
        sizes = [len(self.tokenizer.encode(" " + sentence)) for sentence in self.sentences]
        object.__setattr__(self, "_sizes", sizes)

    def make(self, length: int, depth: float, seed: int) -> tuple[str, str]:
        """Returns a prompt of at most `length` tokens and the number to answer with."""
        rng = np.random.default_rng([seed, length, round(1000 * depth)])
        city = CITIES[rng.integers(len(CITIES))]
        number = "".join(str(digit) for digit in rng.integers(0, 10, self.digits))
        needle = NEEDLE.format(city=city, number=number)
        question = self.question.format(city=city)
        room = length - len(self.tokenizer.encode(f"{needle} \n{question}")) - 2
        start = int(rng.integers(len(self.sentences)))
        chosen, used = [], 0
        while True:
            index = (start + len(chosen)) % len(self.sentences)
            if used + self._sizes[index] > room:
                break
            chosen.append(self.sentences[index])
            used += self._sizes[index]
        chosen.insert(round(depth * len(chosen)), needle)
        return " ".join(chosen) + "\n" + question, number


def score(answer: str, number: str) -> float:
    """1 when the first number of the answer is the needle's."""
    digits = "".join(c if c.isdigit() else " " for c in answer).split()
    return float(bool(digits) and digits[0] == number)


def run(
    endpoint: Endpoint,
    maker: Maker,
    grid: Grid,
    *,
    samples: int = 1,
    seed: int = 0,
    chat: bool = False,
    max_failures: int = 20,
) -> Needles:
    """Asks for every cell's needles, greedily.

    Args:
      samples: needles of a cell, with other cities, numbers and haystacks.
      chat: ask in a conversation; else the text is continued.

    Raises:
      UserError: more than `max_failures` calls failed.
    """
    cells = [(d, l, s) for d in grid.depths for l in grid.lengths for s in range(samples)]
    made = [maker.make(length, depth, seed + sample) for depth, length, sample in cells]
    prompts = [[{"role": "user", "content": text}] if chat else text for text, _ in made]
    options = SamplingOptions(max_tokens=24 if chat else maker.digits + 4, temperature=0.0)
    answers = endpoint.complete(prompts, options)
    remedy = "check the endpoint, or raise --max_failures to leave them out"
    failures = Failures("needle in a haystack", max_failures, remedy)
    values = []
    for answer, (_, number) in zip(answers, made, strict=True):
        if answer.error:
            failures.add(answer.error)
        values.append(np.nan if answer.error else score(answer.text, number))
    shape = len(grid.depths), len(grid.lengths), samples
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of cells without an answer
        scores = np.nanmean(np.array(values).reshape(shape), axis=-1)
    return Needles(grid, scores, str(failures))


def practice(
    rng: np.random.Generator, sentences: Sequence[str], size: int, count: int, digits: int
) -> str:
    """A text to learn retrieval from: `count` needles among `size` sentences, then all again.

    The second time each follows the first as the answer follows the question.

    Args:
      count: at most the number of `CITIES`.
    """
    cities = rng.choice(CITIES, count, replace=False)
    numbers = ["".join(map(str, rng.integers(0, 10, digits))) for _ in cities]
    facts = [NEEDLE.format(city=c, number=n) for c, n in zip(cities, numbers, strict=True)]
    start = int(rng.integers(len(sentences)))
    lines = [sentences[(start + i) % len(sentences)] for i in range(size)]
    for fact in facts:
        lines.insert(int(rng.integers(len(lines) + 1)), fact)
    again = [facts[i] for i in rng.permutation(count)]
    return " ".join(lines) + "\n" + "\n".join(again)


def draw(needles: Needles, path: Path, title: str) -> None:
    """The heat map as a picture: depth over length, red 0 to green 1."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    grid = needles.grid
    image = axes.imshow(needles.scores, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(grid.lengths)), [f"{n:,}" for n in grid.lengths], rotation=60)
    axes.set_yticks(range(len(grid.depths)), [f"{100 * d:.0f} %" for d in grid.depths])
    axes.set(xlabel="tokens", ylabel="depth of the needle", title=title)
    figure.colorbar(image, label="score")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

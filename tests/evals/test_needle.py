"""Needle in a haystack on readers whose memory is known."""

import numpy as np
import pytest

from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Answer
from dsv3_jax.evals.needle import (
    Grid,
    Maker,
    draw,
    practice,
    run,
    score,
    sentences_of,
)


@pytest.fixture(scope="module")
def maker():
    sentences = sentences_of(None)
    texts = [practice(np.random.default_rng(i), sentences, 8, 2, 4) for i in range(50)]
    return Maker(train_tokenizer(texts, 400), sentences)


class Reader:
    """Knows the facts among the last `memory` tokens of a prompt."""

    def __init__(self, tokenizer, memory, error=None):
        self.tokenizer, self.memory, self.error = tokenizer, memory, error

    def complete(self, prompts, options):
        assert options.temperature == 0.0
        return [self.answer(prompt) for prompt in prompts]

    def answer(self, prompt):
        if self.error:
            return Answer(error=self.error)
        seen = self.tokenizer.decode(self.tokenizer.encode(prompt)[-self.memory :])
        question = prompt.rpartition("\n")[2]
        _, found, rest = seen.rpartition("\n")[0].partition(question)
        return Answer(text=rest.partition(".")[0] + "." if found else " 7777.")


def test_the_published_grid():
    grid = Grid()
    assert (grid.lengths[0], grid.lengths[1], grid.lengths[-1]) == (2048, 11 * 1024, 128 * 1024)
    assert len(grid.lengths) == len(grid.depths) == 15
    assert (grid.depths[0], round(grid.depths[1], 2), grid.depths[-1]) == (0.0, 0.07, 1.0)


@pytest.mark.parametrize("length", [100, 333, 1000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_prompt_has_its_length_and_the_needle_its_depth(maker, length, depth):
    prompt, number = maker.make(length, depth, seed=3)
    size = len(maker.tokenizer.encode(prompt)) + 1  # BOS
    assert length - 25 <= size <= length
    haystack, _, question = prompt.rpartition("\n")
    needle = f"{question} {number}."
    assert haystack.count(needle) == 1
    before, _, after = haystack.partition(needle)
    place = len(before) / max(1, len(before) + len(after))
    assert place == pytest.approx(depth, abs=0.12)
    assert maker.make(length, depth, seed=3) == (prompt, number)
    assert maker.make(length, depth, seed=4) != (prompt, number)


def test_scores_are_what_the_reader_remembers(maker, tmp_path):
    grid = Grid.up_to(800, 4)
    everything = run(Reader(maker.tokenizer, 10**6), maker, grid, samples=2)
    assert everything.mean == 1.0
    half = run(Reader(maker.tokenizer, 400), maker, grid, samples=2)
    assert half.at(200) == half.at(400) == 1.0
    np.testing.assert_array_equal(half.scores[:, 3], [0, 0, 1, 1])  # 800 tokens: the later half
    assert run(Reader(maker.tokenizer, 1), maker, grid).mean == 0.0
    draw(half, tmp_path / "needle.png", "half")
    assert (tmp_path / "needle.png").read_bytes().startswith(b"\x89PNG")


def test_failures_are_counted_and_bounded(maker):
    grid = Grid.up_to(200, 2)
    broken = Reader(maker.tokenizer, 1, error="timeout")
    needles = run(broken, maker, grid, max_failures=4)
    assert np.isnan(needles.scores).all() and needles.failures == "timeout 4"
    with pytest.raises(UserError, match="needle in a haystack: 1 failed .timeout 1."):
        run(broken, maker, grid, max_failures=0)


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (" 4821.", 1),
        ("4821", 1),
        ("It is 4821, yes", 1),
        (" 48210", 0),
        (" 1 4821", 0),
        ("", 0),
    ],
)
def test_marks(answer, value):
    assert score(answer, "4821") == value


def test_practice_asks_for_every_needle():
    text = practice(np.random.default_rng(0), sentences_of(None), 9, 3, 2)
    haystack, *again = text.split("\n")
    assert len(again) == 3 and all(haystack.count(fact) == 1 for fact in again)


def test_a_haystack_of_ones_own(tmp_path):
    (tmp_path / "a.txt").write_text("One is here. Two is there!\nThree?")
    assert sentences_of(str(tmp_path / "a.txt")) == ["One is here.", "Two is there!", "Three?"]
    (tmp_path / "b.txt").write_text(" \n")
    with pytest.raises(UserError, match="holds no sentence"):
        sentences_of(str(tmp_path / "b.txt"))
    with pytest.raises(UserError, match="cannot be read"):
        sentences_of(str(tmp_path / "c.txt"))

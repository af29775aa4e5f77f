"""Probabilities of texts, against teacher forcing in float64."""

import math

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.evals.perplexity import Scorer, Window, score_text, text_windows

WINDOW = 16
TEXT = "What is it? It is what it is, naïve as it is. " * 3


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, WINDOW, rows=3)


@pytest.fixture(scope="module")
def logprobs(forced):
    """ids -> float64 log softmax of each of them after the first."""

    def of(ids):
        logits, targets = forced(ids)[:-1], np.array(ids[1:])
        chosen = logits[np.arange(len(targets)), targets]
        return chosen - np.log(np.exp(logits).sum(-1))

    return of


def test_windows_score_every_token_once_with_enough_before_it():
    ids = list(range(100))
    for window, stride in [(16, 8), (16, 16), (16, 1), (7, 3), (200, 50)]:
        scored = []
        for part, start in text_windows(ids, window, stride):
            assert len(part) <= window + 1
            assert list(part) == list(range(part[0], part[0] + len(part)))
            first = part[start]
            assert start >= min(first, window - stride + 1), "too little context"
            scored += part[start:]
        assert scored == ids[1:]


def test_sums_over_part_of_a_window(logprobs, scorer):
    rng = np.random.default_rng(0)
    windows = [
        Window(rng.integers(0, 280, length).tolist(), start)
        for length, start in [(17, 1), (17, 9), (5, 4), (9, 9), (2, 1)]
    ]
    for window, score in zip(windows, scorer.score(windows), strict=True):
        expected = logprobs(window.ids)[window.start - 1 :].sum()
        assert score.logprob == pytest.approx(expected, rel=1e-5)


def test_greedy_is_told(greedy, scorer):
    prompt = [0, 5, 6]
    ids = [*prompt, *greedy(prompt, 5)]
    other = ids[:-1] + [(ids[-1] + 1) % 280]
    assert [score.greedy for score in scorer.score([Window(ids, 3), Window(other, 3)])] == [
        True,
        False,
    ]


def test_bits_per_byte_and_perplexity_of_a_text(logprobs, scorer, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    nats = 0.0
    for target in range(1, len(ids)):  # a window of 16 tokens, moved by 4
        if target <= WINDOW:
            begin = 0
        else:
            begin = min(WINDOW + 4 * -(-(target - WINDOW) // 4), len(ids) - 1) - WINDOW
        nats -= logprobs(ids[begin : target + 1])[-1]
    score = score_text(scorer, tokenizer, TEXT, stride=4)
    assert score.num_tokens == len(ids) - 1
    assert score.num_bytes == len(TEXT.encode()) == len(TEXT) + 3  # ï has two bytes, three times
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / len(TEXT.encode()), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)


def test_mistakes(scorer, tokenizer):
    with pytest.raises(UserError, match="stride=17 must lie in 1..16"):
        score_text(scorer, tokenizer, TEXT, stride=17)
    with pytest.raises(UserError, match="is empty"):
        score_text(scorer, tokenizer, "")

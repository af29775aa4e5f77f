"""How likely a model holds texts: log probabilities, perplexity, bits per byte.

Shape letters: B windows, T tokens, X tokens of a chunk, D width, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import DeepSeekV3

_CHUNK_TOKENS = 512  # of every window whose logits exist at once


class Window(NamedTuple):
    """Tokens for one pass; those from `start` on are scored, with all before them as context."""

    ids: Sequence[int]
    start: int


class WindowScore(NamedTuple):
    logprob: float  # nats, of the scored tokens together
    greedy: bool  # each of them is the most likely one


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """Of a whole text."""

    nats: float  # -log of its probability
    num_tokens: int
    num_bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers (spec §12)."""
        return self.nats / math.log(2) / self.num_bytes

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; comparable with the same tokenizer only."""
        return math.exp(self.nats / self.num_tokens)


class Scorer:
    """Scores windows of tokens, `rows` at a time, by one compiled program."""

    def __init__(self, model: DeepSeekV3, window: int, rows: int = 4):
        """`window`: tokens of a pass that predict one; `rows` must divide over the model's mesh."""
        self.window, self._rows = window, rows
        self._graphdef, self._state = nnx.split(model)

    def score(self, windows: Iterable[Window]) -> list[WindowScore]:
        """In the order given; a window has at most `window` + 1 tokens and starts at 1 or later."""
        windows, scores = list(windows), []
        for first in range(0, len(windows), self._rows):
            batch = windows[first : first + self._rows]
            tokens = np.zeros((self._rows, self.window + 1), np.int32)
            scored = np.zeros((self._rows, self.window), bool)
            for row, (ids, start) in enumerate(batch):
                assert 1 <= start <= len(ids) <= self.window + 1
                tokens[row, : len(ids)] = ids
                scored[row, start - 1 : len(ids) - 1] = True
            logprob_B, greedy_B = jax.device_get(
                _score(self._graphdef, self._state, tokens, scored)
            )
            scores += map(WindowScore, logprob_B.tolist(), greedy_B.tolist())
        return scores[: len(windows)]


@partial(jax.jit, static_argnums=0)
def _score(graphdef, state, tokens_BT1, scored_BT):
    """Summed log probabilities of the scored targets, and whether all are the likeliest."""
    model = nnx.merge(graphdef, state)
    hidden_BTD, _, _ = model.hidden_states(tokens_BT1[:, :-1], mtp=False)
    num_rows, length = scored_BT.shape
    chunk = next(size for size in range(min(_CHUNK_TOKENS, length), 0, -1) if length % size == 0)

    def chunks(array):
        return jnp.moveaxis(array.reshape(num_rows, -1, chunk, *array.shape[2:]), 1, 0)

    def add(carry, inputs):
        hidden_BXD, targets_BX, scored_BX = inputs
        logits_BXV = model.logits(hidden_BXD)
        target_BX = jnp.take_along_axis(logits_BXV, targets_BX[..., None], -1)[..., 0]
        logprob_BX = target_BX - jax.nn.logsumexp(logits_BXV, -1)
        is_best_BX = jnp.argmax(logits_BXV, -1) == targets_BX
        logprob_B, greedy_B = carry
        logprob_B += jnp.sum(jnp.where(scored_BX, logprob_BX, 0.0), -1)
        return (logprob_B, greedy_B & jnp.all(is_best_BX | ~scored_BX, -1)), None

    start = (jnp.zeros(num_rows), jnp.ones(num_rows, bool))
    inputs = tuple(map(chunks, (hidden_BTD, tokens_BT1[:, 1:], scored_BT)))
    return jax.lax.scan(add, start, inputs)[0]


def text_windows(ids: Sequence[int], window: int, stride: int) -> list[Window]:
    """Cuts a long text so that every token but the first is scored in exactly one window.

    Args:
      window: tokens of a pass that predict one.
      stride: tokens that each further window scores; window - stride before them are context.
    """
    assert 1 <= stride <= window
    windows, scored = [], 1
    while scored < len(ids):
        end = min(len(ids), scored + (window if scored == 1 else stride))
        begin = max(0, end - window - 1)
        windows.append(Window(ids[begin:end], scored - begin))
        scored = end
    return windows


def score_text(
    scorer: Scorer, tokenizer: Tokenizer, text: str, stride: int | None = None
) -> TextScore:
    """The probability of a text after the beginning-of-sentence token.

    Args:
      stride: as in `text_windows`; None: half a window, so that no token but the first of the text
        has less than half a window before it.

    Raises:
      UserError: there is no text, or the stride is no part of a window.
    """
    if stride is not None and not 1 <= stride <= scorer.window:
        raise UserError(f"stride={stride} must lie in 1..{scorer.window}, the tokens of a window")
    if not text:
        raise UserError("the text to score is empty; give a file with text in it")
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    windows = text_windows(ids, scorer.window, stride or max(1, scorer.window // 2))
    # Sums of float32 by window; their sum, of millions of tokens, in float64.
    nats = -math.fsum(score.logprob for score in scorer.score(windows))
    return TextScore(nats=nats, num_tokens=len(ids) - 1, num_bytes=len(text.encode()))

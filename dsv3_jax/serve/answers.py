"""Answers of the OpenAI API, from the outputs of an engine."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_jax.serve.requests import Output, TokenLogprobs
from dsv3_jax.serve.text import TextStream, TokenBytes

_LOWEST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Part of a choice, or the whole of it."""

    text: str = ""
    # Of each token: where it begins in the text, and its probabilities.
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()
    finish_reason: str | None = None  # 'stop', 'length'; None: goes on

    def __add__(self, other: "Piece") -> "Piece":
        return Piece(
            text=self.text + other.text,
            logprobs=self.logprobs + other.logprobs,
            finish_reason=other.finish_reason,
        )


class Choice:
    """One text of an answer: counts its tokens and turns them into pieces.

    A token that ends the text is counted, but neither shown nor among the logprobs.
    """

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str], stop_ids: frozenset[int]):
        self._token_bytes, self._stop_ids = token_bytes, stop_ids
        self._stream = TextStream(stops)
        self.num_tokens = 0

    def push(self, output: Output) -> Piece:
        """What an output adds. A `finish_reason` of 'stop' may come before the engine's."""
        text, logprobs, reason = "", [], output.finish_reason
        for position, token in enumerate(output.tokens):
            self.num_tokens += 1
            if token in self._stop_ids:
                break  # the last one
            if output.logprobs:
                logprobs.append((self._stream.num_characters, output.logprobs[position]))
            text += self._stream.push(self._token_bytes[token])
            if self._stream.stopped:
                reason = "stop"
                break
        if reason is not None:
            text += self._stream.finish()
        return Piece(text=text, logprobs=tuple(logprobs), finish_reason=reason)


class CompletionFormat:
    """How /v1/completions answers; a piece looks like the whole."""

    kind = stream_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, token_bytes: TokenBytes, num_logprobs: int | None):
        self._token_bytes, self._wanted = token_bytes, num_logprobs is not None

    def first(self, index: int, echo: str) -> dict[str, Any]:
        """What a stream opens a choice with."""
        return self.part(index, Piece(text=echo))

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs(piece) if self._wanted else None,
            "finish_reason": piece.finish_reason,
        }

    whole = part

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tokens = [found for _, found in piece.logprobs]
        return {
            "tokens": [self._name(found.token) for found in tokens],
            "token_logprobs": [_number(found.logprob) for found in tokens],
            # Backwards, so that of tokens that read alike the likeliest stays.
            "top_logprobs": [
                {self._name(token): _number(value) for token, value in reversed(found.top)}
                for found in tokens
            ],
            "text_offset": [offset for offset, _ in piece.logprobs],
        }

    def _name(self, token: int) -> str:
        return _readable(self._token_bytes[token])


class ChatFormat:
    """How /v1/chat/completions answers."""

    kind, stream_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, token_bytes: TokenBytes, num_logprobs: int | None):
        self._token_bytes, self._wanted = token_bytes, num_logprobs is not None

    def first(self, index: int, echo: str) -> dict[str, Any]:
        """What a stream opens a choice with."""
        return self._choice(index, "delta", {"role": "assistant", "content": echo}, Piece())

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return self._choice(index, "delta", delta, piece)

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, "message", message, piece)

    def _choice(self, index: int, key: str, said: dict[str, Any], piece: Piece) -> dict[str, Any]:
        tokens = [found for _, found in piece.logprobs]
        logprobs = {"content": [self._token(found) for found in tokens], "refusal": None}
        return {
            "index": index,
            key: said,
            "logprobs": logprobs if self._wanted else None,
            "finish_reason": piece.finish_reason,
        }

    def _token(self, found: TokenLogprobs) -> dict[str, Any]:
        top = [self._entry(token, logprob) for token, logprob in found.top]
        return {**self._entry(found.token, found.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._token_bytes[token]
        return {"token": _readable(data), "bytes": list(data), "logprob": _number(logprob)}


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """What all the events of an answer share."""

    format: CompletionFormat | ChatFormat
    model: str
    identifier: str
    created: int

    @classmethod
    def new(cls, format: CompletionFormat | ChatFormat, model: str) -> "Envelope":
        identifier = f"{format.prefix}-{uuid.uuid4().hex}"
        return cls(format=format, model=model, identifier=identifier, created=int(time.time()))

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        choices = [self.format.whole(index, piece) for index, piece in enumerate(pieces)]
        return self._wrap(self.format.kind, choices) | {"usage": usage}

    def event(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._wrap(self.format.stream_kind, choices)

    def _wrap(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.identifier,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


def usage(num_prompt_tokens: int, num_new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_new_tokens,
        "total_tokens": num_prompt_tokens + num_new_tokens,
    }


def _readable(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _number(logprob: float) -> float:
    return max(_LOWEST, logprob)  # in this order, NaN too becomes the lowest

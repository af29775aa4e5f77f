"""Packing of documents into rows (spec §8): concatenated, then cut, nothing padded or dropped."""

import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np


class PackDataset(grain.IterDataset):
    """Rows of T + 1 tokens every T tokens of the concatenated documents.

    Consecutive rows share one token, the last of one and the first of the next, so with inputs
    [:-1] and targets [1:] every token but the very first is a target exactly once. Rows run across
    document boundaries; what is left at the end of a finite dataset is dropped.

    Elements are dicts of int32 arrays: "tokens" [T + 1] and, with `segments`, "segments" [T + 1],
    the number of the token's document within the row, from 1.
    """

    def __init__(self, documents: grain.IterDataset, sequence_length: int, segments: bool):
        """`documents` yields non-empty integer arrays; `sequence_length` is T."""
        super().__init__(documents)
        self._sequence_length, self._segments = sequence_length, segments

    def __iter__(self) -> "PackIterator":
        return PackIterator(iter(self._parent), self._sequence_length, self._segments)


class PackIterator(grain.DatasetIterator):
    """Its state is the position of the next row's first token, so a row may be of any length."""

    def __init__(self, documents: grain.DatasetIterator, sequence_length: int, segments: bool):
        super().__init__(documents)
        self._sequence_length, self._segments = sequence_length, segments
        self._document: np.ndarray | None = None  # the one that holds the next row's first token
        self._offset = 0  # of that token
        self._before = self._parent.get_state()  # the documents' state ahead of it

    def __next__(self) -> dict[str, np.ndarray]:
        if self._document is None:
            self._document = next(self._parent)
        document, offset, before = self._document, self._offset, self._before
        pieces, missing = [], self._sequence_length + 1
        while True:
            piece = document[offset : offset + missing]
            pieces.append(piece)
            offset, missing = offset + len(piece), missing - len(piece)
            if not missing:
                break
            before = self._parent.get_state()
            document, offset = next(self._parent), 0
            assert len(document), "an empty document has no last token to start a row from"
        self._document, self._offset, self._before = document, offset - 1, before
        row = {"tokens": np.concatenate(pieces).astype(np.int32)}
        if self._segments:
            numbers = np.arange(1, len(pieces) + 1, dtype=np.int32)
            row["segments"] = np.repeat(numbers, [len(piece) for piece in pieces])
        return row

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._before, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["documents"])
        self._before, self._offset, self._document = state["documents"], state["offset"], None


class InterleaveDataset(grain.IterDataset):
    """One row of each endless stream in turn: rows side by side come from different documents."""

    def __init__(self, streams: Sequence[grain.IterDataset]):
        super().__init__(streams)

    def __iter__(self) -> "InterleaveIterator":
        return InterleaveIterator([iter(stream) for stream in self._parents])


class InterleaveIterator(grain.DatasetIterator):
    """Its state is the stream to read next and every stream's state, as text: reading ahead keeps
    a copy for each row."""

    def __init__(self, streams: Sequence[grain.DatasetIterator]):
        super().__init__(streams)
        self._next = 0
        self._states = [json.dumps(stream.get_state()) for stream in streams]

    def __next__(self) -> dict[str, np.ndarray]:
        stream = self._parents[self._next]
        row = next(stream)
        self._states[self._next] = json.dumps(stream.get_state())
        self._next = (self._next + 1) % len(self._parents)
        return row

    def get_state(self) -> dict[str, Any]:
        return {"next": self._next, "streams": list(self._states)}

    def set_state(self, state: dict[str, Any]) -> None:
        assert len(state["streams"]) == len(self._parents), "saved with other streams"
        self._next, self._states = state["next"], list(state["streams"])
        for stream, text in zip(self._parents, self._states, strict=True):
            stream.set_state(json.loads(text))

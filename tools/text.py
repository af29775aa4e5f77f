"""Texts that tools print and read: tables for terminals, answers of a server."""

import json
from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lines with the cells of a column under each other, the first `num_left` from the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def num_ended(text: str, stream: bool) -> int:
    """Choices that say how they ended."""
    if stream:  # by line feeds alone: other ends of lines may stand in what a model writes
        data = [line[6:] for line in text.split("\n") if line.startswith("data: {")]
        choices = [choice for event in data for choice in json.loads(event).get("choices", ())]
    else:
        choices = json.loads(text)["choices"]
    return sum(choice["finish_reason"] in ("stop", "length") for choice in choices)

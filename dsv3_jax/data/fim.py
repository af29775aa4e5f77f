"""Fill-in-the-middle at document level, prefix-suffix-middle order (spec §8)."""

from typing import NamedTuple

import numpy as np


class FimIds(NamedTuple):
    """Ids of the three control tokens."""

    begin: int
    hole: int
    end: int


def fill_in_the_middle(ids_X: np.ndarray, fim: FimIds, rng: np.random.Generator) -> np.ndarray:
    """Rearranges a document to `begin prefix hole suffix end middle`; EOS follows outside.

    The split rule is unpublished: two cuts are drawn uniformly over the token boundaries, ends
    included, so any part may be empty and no token is cut.

    Args:
      ids_X: integer [X], a document without BOS and EOS.

    Returns:
      Integers [X + 3] of the same type.
    """
    first, second = np.sort(rng.integers(0, len(ids_X) + 1, size=2))
    prefix, middle, suffix = np.split(ids_X, [first, second])
    begin, hole, end = (np.array([i], ids_X.dtype) for i in (fim.begin, fim.hole, fim.end))
    return np.concatenate([begin, prefix, hole, suffix, end, middle])

"""Weighted mixtures of endless, reshuffled sources."""

from collections.abc import Sequence

import grain
import numpy as np


def mix(
    sources: Sequence[grain.MapDataset],
    token_shares: Sequence[float],
    tokens_per_document: Sequence[float],
    seed: int,
) -> grain.MapDataset:
    """One endless dataset of documents; each source starts over reshuffled when it is used up.

    Args:
      sources: finite datasets.
      token_shares: relative shares of the mixture's tokens; grain keeps them to about 1 %.
      tokens_per_document: mean length of each source's documents, which turns shares of tokens
        into shares of documents.
      seed: of the shuffles; the sources' own seeds derive from it.
    """
    seeds = np.random.SeedSequence(seed).generate_state(len(sources))
    endless = [
        source.shuffle(seed=int(s)).repeat() for source, s in zip(sources, seeds, strict=True)
    ]
    shares = [w / t for w, t in zip(token_shares, tokens_per_document, strict=True)]
    return grain.MapDataset.mix(endless, weights=shares)

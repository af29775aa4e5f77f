"""Scores of samples of problems: pass@k and how sure they are."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # of a two-sided 95 % interval
_RESAMPLES = 10_000


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Chance that one of k samples is right, estimated without bias from n >= k of them.

    1 - C(n - c, k) / C(n, k): the share of the k-subsets that hold a right one (Chen et al. 2021,
    arXiv:2107.03374, eq. 1).
    """
    assert 0 <= num_right <= num_samples and 1 <= k <= num_samples
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def wilson_interval(num_right: int, num_items: int) -> tuple[float, float]:
    """95 % interval of a share that was seen as `num_right` of `num_items` (Wilson 1927)."""
    share, z2 = num_right / num_items, _Z**2 / num_items
    centre = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / num_items + z2 / (4 * num_items))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, by drawing as many with replacement 10,000 times."""
    values_N, rng = np.asarray(values, np.float64), np.random.default_rng(seed)
    # One draw at a time: all at once would be gigabytes for a large benchmark.
    means = [rng.choice(values_N, len(values_N)).mean() for _ in range(_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

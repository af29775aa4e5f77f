"""pass@k and intervals, against counting and simulation."""

import itertools

import numpy as np
import pytest

from dsv3_jax.evals.statistics import bootstrap_interval, pass_at_k, wilson_interval


@pytest.mark.parametrize("n, c, k", [(5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 1), (4, 3, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    expected = sum(max(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_wilson_interval_solves_its_equation():
    # Its ends are the shares p at which the seen one is 1.96 standard deviations away.
    for right, items in [(0, 10), (3, 10), (10, 10), (700, 1319)]:
        for p in wilson_interval(right, items):
            deviation = abs(right / items - p)
            assert deviation == pytest.approx(1.959964 * np.sqrt(p * (1 - p) / items), abs=1e-6)


def test_wilson_interval_covers():
    rng = np.random.default_rng(0)
    right = rng.binomial(100, 0.9, size=2000)
    covered = [low <= 0.9 <= high for low, high in (wilson_interval(int(c), 100) for c in right)]
    assert 0.92 < np.mean(covered) < 0.98


def test_bootstrap_interval_is_that_of_the_normal_for_a_large_sample():
    values = np.random.default_rng(0).random(1000)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.002)
    assert high == pytest.approx(values.mean() + half, abs=0.002)
    assert bootstrap_interval(values) == (low, high)

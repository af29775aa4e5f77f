"""The measure of spec §5.7: smoothed losses, and how far apart they are."""

import numpy as np

from dsv3_jax.train.compare import relative_gaps, smoothed


def test_smoothed_is_a_weighted_mean_of_the_past():
    losses = np.random.default_rng().uniform(1, 5, 40)
    weights = 0.1 * 0.9 ** np.arange(39, -1, -1)
    weights[0] *= 10  # the first loss stands for all before it
    assert np.isclose(weights.sum(), 1)
    np.testing.assert_allclose(smoothed(losses)[-1], weights @ losses)
    np.testing.assert_allclose(smoothed(losses[:7]), smoothed(losses)[:7])


def test_gap_is_relative_to_the_second_and_positive_where_the_first_is_worse():
    baseline = np.random.default_rng().uniform(1, 5, 20)
    np.testing.assert_allclose(relative_gaps(1.25 * baseline, baseline), 0.25)
    assert not relative_gaps(baseline, baseline).any()
    late = baseline + (np.arange(20) >= 10)
    gaps = relative_gaps(late, baseline)
    assert not gaps[:10].any() and (gaps[10:] > 0).all()
    assert np.isnan(relative_gaps([*baseline, np.nan], [*baseline, 1.0])[-1])

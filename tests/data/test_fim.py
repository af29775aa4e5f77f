"""Fill-in-the-middle against the order of spec §8."""

import numpy as np
import pytest

from dsv3_jax.data.fim import FimIds, fill_in_the_middle

FIM = FimIds(begin=901, hole=900, end=902)


@pytest.mark.parametrize("length", [0, 1, 2, 50])
def test_parts_restore_the_document(length):
    for seed in range(50):
        ids = np.random.default_rng(1000 + seed).integers(0, 900, length).astype(np.uint16)
        out = fill_in_the_middle(ids, FIM, np.random.default_rng(seed))
        assert out.dtype == ids.dtype and out[0] == FIM.begin
        (hole,), (end,) = np.flatnonzero(out == FIM.hole), np.flatnonzero(out == FIM.end)
        prefix, suffix, middle = out[1:hole], out[hole + 1 : end], out[end + 1 :]
        np.testing.assert_array_equal(np.concatenate([prefix, middle, suffix]), ids)
        again = fill_in_the_middle(ids, FIM, np.random.default_rng(seed))
        np.testing.assert_array_equal(out, again)


def test_cuts_are_uniform_over_token_boundaries():
    ids, rng = np.arange(3), np.random.default_rng(0)
    counts: dict[tuple[int, int], int] = {}
    for _ in range(16_000):
        out = fill_in_the_middle(ids, FIM, rng)
        (hole,), (end,) = np.flatnonzero(out == FIM.hole), np.flatnonzero(out == FIM.end)
        cuts = int(hole) - 1, int(hole) - 1 + len(out) - int(end) - 1
        counts[cuts] = counts.get(cuts, 0) + 1
    # 4 x 4 ordered draws: equal cuts come once, different ones twice.
    for first in range(4):
        for second in range(first, 4):
            expected = 1000 if first == second else 2000
            assert abs(counts[first, second] - expected) < 5 * expected**0.5

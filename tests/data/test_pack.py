"""Packing against plain concatenation, and its position at every step."""

import grain
import numpy as np
import pytest

from dsv3_jax.data.mixture import mix
from dsv3_jax.data.pack import PackDataset


def _documents(seed, count=40, longest=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, n) for n in rng.integers(1, longest, count)]


def _pack(documents, length, segments=False):
    return PackDataset(
        grain.MapDataset.source(documents).to_iter_dataset(), length, segments=segments
    )


@pytest.mark.parametrize("length", [1, 4, 7, 100])
def test_every_token_is_a_target_once(length):
    documents = _documents(length)
    stream = np.concatenate(documents)
    rows = [row["tokens"] for row in _pack(documents, length)]
    assert len(rows) == (len(stream) - 1) // length
    for i, row in enumerate(rows):
        assert row.dtype == np.int32
        np.testing.assert_array_equal(row, stream[i * length : (i + 1) * length + 1])
    targets = np.concatenate([row[1:] for row in rows])
    np.testing.assert_array_equal(targets, stream[1 : len(targets) + 1])


@pytest.mark.parametrize("length", [1, 5, 64])
def test_segments_number_the_documents_of_a_row(length):
    documents = _documents(10 + length)
    owner = np.repeat(np.arange(len(documents)), [len(d) for d in documents])
    for i, row in enumerate(_pack(documents, length, segments=True)):
        owners = owner[i * length : (i + 1) * length + 1]
        np.testing.assert_array_equal(row["segments"], owners - owners[0] + 1)
        assert row["segments"].dtype == np.int32 and set(row) == {"tokens", "segments"}


@pytest.mark.parametrize("segments", [False, True])
def test_position_is_exact_at_every_step(segments):
    dataset = _pack(_documents(3), 9, segments)
    grain.experimental.assert_equal_output_after_checkpoint(dataset)


def test_a_position_serves_another_row_length():
    documents = _documents(4)
    stream = np.concatenate(documents)
    iterator = iter(_pack(documents, 9))
    for _ in range(5):
        next(iterator)
    longer = iter(_pack(documents, 20))
    longer.set_state(iterator.get_state())
    np.testing.assert_array_equal(next(longer)["tokens"], stream[45:66])


def test_mixture_shares_tokens_not_documents():
    rng = np.random.default_rng(0)
    lengths = (10, 300)
    sources = [
        grain.MapDataset.source([np.full(n, i) for n in rng.integers(m // 2, 3 * m // 2, 50)])
        for i, m in enumerate(lengths)
    ]
    means = [np.mean([len(s[i]) for i in range(50)]) for s in sources]
    mixed = mix(sources, (3.0, 1.0), means, seed=5)
    counts = np.zeros(2)
    for i in range(6000):
        document = mixed[i]
        counts[document[0]] += len(document)
    assert abs(counts[0] / counts.sum() - 0.75) < 0.02


def test_mixture_reshuffles_every_epoch():
    sources = [grain.MapDataset.source(list(range(start, start + 30))) for start in (0, 100)]
    stream = [mix(sources, (1.0, 1.0), (5.0, 5.0), seed=1)[i] for i in range(120)]
    first, second = ([x for x in stream if x < 100][i : i + 30] for i in (0, 30))
    assert sorted(first) == sorted(second) == list(range(30)) and first != second
    other = [x - 100 for x in stream if x >= 100][:30]
    assert sorted(other) == list(range(30)) and other != first
    assert stream != [mix(sources, (1.0, 1.0), (5.0, 5.0), seed=2)[i] for i in range(120)]

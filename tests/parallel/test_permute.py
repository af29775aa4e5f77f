"""Sorting pairs into slots, and the two moves that are each other's transpose."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.parallel.permute import align, collect, sort_pairs, spread

X, K, G = 11, 3, 4
rng = np.random.default_rng(0)
IDS_XK = np.array([rng.permutation(G + 1)[:K] for _ in range(X)], np.int32)  # G: nowhere
IDS_XK[2] = IDS_XK[5] = G


def test_slots_are_sorted_by_group_and_keep_the_order_of_pairs():
    rows, pairs, sizes_G = sort_pairs(jnp.asarray(IDS_XK), G)
    flat = IDS_XK.ravel()
    expected = [pair for group in range(G) for pair in np.flatnonzero(flat == group)]
    np.testing.assert_array_equal(sizes_G, np.bincount(flat, minlength=G + 1)[:G])
    np.testing.assert_array_equal(pairs.row_M[: len(expected)], expected)
    np.testing.assert_array_equal(rows.row_M[: len(expected)], np.array(expected) // K)
    for pair, slot in enumerate(np.asarray(rows.slot_XK).ravel()):
        assert slot == (expected.index(pair) if flat[pair] < G else len(rows.row_M))
    assert (rows.row_M[len(expected) :] >= X).all() and len(rows.row_M) == X * K


def test_two_groups_need_at_most_two_slots_a_row():
    ids_XK = jnp.asarray(np.array([rng.permutation(4)[:K] for _ in range(X)]).clip(max=2))
    rows, _, sizes_G = sort_pairs(ids_XK, 2)
    assert len(rows.row_M) == 2 * X >= sizes_G.sum()


def test_aligned_groups_start_at_multiples_and_hold_the_same_rows():
    ids_XK = np.where(IDS_XK == 1, G, IDS_XK)  # group 1 is empty
    plain = sort_pairs(jnp.asarray(ids_XK), G)
    rows, pairs, sizes_G = align(*plain, 8)
    counts = np.bincount(ids_XK.ravel(), minlength=G + 1)[:G]
    np.testing.assert_array_equal(sizes_G, -(-counts // 8) * 8)
    assert len(rows.row_M) == len(pairs.row_M) == -(-(X * K + 7 * G) // 8) * 8
    expected = np.full(len(pairs.row_M), -1)
    for start, group in zip(np.cumsum(sizes_G) - sizes_G, range(G), strict=True):
        own = np.flatnonzero(ids_XK.ravel() == group)
        expected[start : start + len(own)] = own
    full = expected >= 0
    np.testing.assert_array_equal(pairs.row_M[full], expected[full])
    np.testing.assert_array_equal(rows.row_M[full], expected[full] // K)
    assert (pairs.row_M[~full] >= X * K).all() and (rows.row_M[~full] >= X).all()
    for pair, slot in enumerate(np.asarray(rows.slot_XK).ravel()):
        assert slot == (list(expected).index(pair) if ids_XK.ravel()[pair] < G else len(expected))
    np.testing.assert_array_equal(pairs.slot_XK.ravel(), rows.slot_XK.ravel())


def test_aligned_slots_suffice_for_the_worst_case():
    for ids_XK in (np.full((X, 1), 2), np.arange(X)[:, None] % G):
        rows, _, sizes_G = align(*sort_pairs(jnp.asarray(ids_XK, jnp.int32), G), 8)
        assert sizes_G.sum() <= len(rows.row_M)


def test_spread_and_collect_are_transposes_and_derivatives():
    rows, _, _ = sort_pairs(jnp.asarray(IDS_XK), G)
    x_XD = rng.normal(size=(X, 5)).astype(np.float32)
    y_MD = rng.normal(size=(X * K, 5)).astype(np.float32)  # empty slots hold numbers too
    spread_MD, spread_transpose = jax.vjp(lambda x: spread(x, rows), jnp.asarray(x_XD))
    collected_XD, collect_transpose = jax.vjp(lambda y: collect(y, rows), jnp.asarray(y_MD))
    np.testing.assert_allclose(np.vdot(spread_MD, y_MD), np.vdot(x_XD, collected_XD), rtol=1e-5)
    np.testing.assert_array_equal(spread_transpose(jnp.asarray(y_MD))[0], collected_XD)
    np.testing.assert_array_equal(collect_transpose(jnp.asarray(x_XD))[0], spread_MD)
    for x_D, ids_K, total_D in zip(x_XD, IDS_XK, collect(spread_MD, rows), strict=True):
        np.testing.assert_allclose(total_D, (ids_K < G).sum() * x_D, rtol=1e-6)


def test_collect_adds_in_float32():
    rows, _, _ = sort_pairs(jnp.asarray([[0, 1, 2]]), 3)
    y_MD = jnp.asarray([[256.0], [0.75], [0.75]], jnp.bfloat16)  # one by one, bf16 drops both
    assert collect(y_MD, rows).item() == 258.0 and collect(y_MD, rows).dtype == jnp.bfloat16

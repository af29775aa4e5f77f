"""Rotary positions: spec §2's check values, and rotation as complex multiplication."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.config import YarnConfig
from dsv3_jax.configs.deepseek_v3_671b import deepseek_v3_671b
from dsv3_jax.model import rope

V3 = deepseek_v3_671b().model
V3_YARN = dataclasses.replace(V3, yarn=YarnConfig(enabled=True))


def test_plain_frequencies():
    expected = 10000.0 ** (-2 * np.arange(32) / 64)
    np.testing.assert_allclose(rope.inverse_frequencies(V3), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "pair, theta",
    [
        (0, 1.0),
        (9, 0.0749894209),
        (10, 0.0562341325),
        (11, 0.0390069266),
        (16, 0.0055),
        (22, 1.77828e-4),
        (23, 3.33380e-5),
        (31, 3.33380e-6),
    ],
)
def test_yarn_frequencies(pair, theta):
    np.testing.assert_allclose(rope.inverse_frequencies(V3_YARN)[pair], theta, rtol=2e-6)


@pytest.mark.parametrize(
    "original_length, factors", [(1, [1.0, 0.1, 0.1, 0.1]), (10**9, [1.0, 1.0, 1.0, 1.0])]
)
def test_yarn_is_a_step_when_both_bounds_clamp_to_one_pair(original_length, factors):
    yarn = YarnConfig(enabled=True, factor=10.0, original_length=original_length)
    config = dataclasses.replace(V3, qk_rope_head_dim=8, rope_theta=10.0, yarn=yarn)
    got = rope.inverse_frequencies(config) / 10.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(got, factors, rtol=1e-5)


def test_softmax_scale_has_m_squared_only_with_yarn():
    np.testing.assert_allclose(rope.softmax_scale(V3), 0.07216878364870322, rtol=1e-14)
    np.testing.assert_allclose(rope.softmax_scale(V3_YARN), 0.1352337788608801, rtol=1e-14)
    v2_lite = dataclasses.replace(V3, yarn=YarnConfig(enabled=True, mscale=0.707))
    m = (rope.softmax_scale(v2_lite) / rope.softmax_scale(V3)) ** 0.5
    np.testing.assert_allclose(m, 1.26080, rtol=1e-5)


def test_positions_restart_in_each_document():
    assert rope.positions(5).tolist() == [[0, 1, 2, 3, 4]]
    segments = np.array([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 3, 4, 4]], np.int32)
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 0, 0, 1]]
    assert rope.positions(7, segments).tolist() == expected


@pytest.mark.parametrize("shape", [(2, 7, 64), (2, 7, 3, 64)], ids=["key", "queries"])
def test_rotation_is_a_complex_product_on_adjacent_pairs(shape):
    rng = np.random.default_rng(len(shape))
    x = rng.standard_normal(shape).astype(np.float32)
    positions = rng.integers(0, 4096, (2, 7)).astype(np.int32)
    got = rope.rotate(x, rope.cos_sin(positions, V3_YARN))
    # Angles rounded to float32 as specified; everything after in double precision.
    angles = positions[..., None].astype(np.float32) * rope.inverse_frequencies(V3_YARN)
    turn = np.exp(1j * angles.astype(np.float64))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (turn if len(shape) == 3 else turn[:, :, None])
    expected = np.stack([turned.real, turned.imag], axis=-1).reshape(shape)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert rope.rotate(x.astype(np.float16), rope.cos_sin(positions, V3)).dtype == np.float16

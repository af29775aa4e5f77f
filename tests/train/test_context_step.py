"""Whole training steps with sequences split over `context` equal those of one device."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from test_step import run

from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.train.state import abstract_state, inference_graphdef, init_state
from dsv3_jax.train.step import make_eval_step

T = 16


@pytest.fixture(scope="module")
def config(small_config):
    """16 tokens: the next one of every second token or so lies across the border of a chunk."""
    return replace(small_config, data=replace(small_config.data, sequence_length=T))


@pytest.fixture(scope="module")
def batches():
    """Two steps of 8 sequences of documents kept apart, every second with padding at its end."""
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 64, (2, 1, 8, T + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (2, 1, 8, T + 1)), axis=-1).astype(np.int32)
    segments[:, :, ::2, -5:] = 0
    return [{"tokens": tokens[i], "segments": segments[i]} for i in range(2)]


def run_split(config, parallel, batches, start):
    """After each step the state and metrics; and the evaluation loss of the last batch."""
    config = replace(config, parallel=replace(config.parallel, **parallel))
    mesh = make_mesh(config.parallel)
    history = run(config, mesh, batches, start=start)
    evaluate = make_eval_step(inference_graphdef(config, mesh))
    batch = jax.device_put(batches[-1], batch_sharding(mesh, leading=1))
    state = history[-1][0]
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh)[1])
    state = jax.device_put(state, shardings)
    last = jax.tree.map(lambda x: x[0], batch)
    return history, float(evaluate(state.params, state.router_bias, last))


@pytest.fixture(scope="module")
def start(config):
    return jax.device_get(init_state(config, make_mesh(config.parallel))[1])


@pytest.fixture(scope="module")
def one_device(config, start, batches):
    return run_split(config, {}, batches, start)


@pytest.mark.parametrize(
    ("parallel", "remat"),
    [
        ({"context": 2, "expert": 2, "data": 2}, "paper"),
        ({"context": 4, "expert": 2, "layout": "fsdp_ep"}, "none"),
    ],
)
def test_split_sequences_train_like_whole_ones(config, start, batches, one_device, parallel, remat):
    """Loss, gradients and weights to 1e-5; counts and the router bias of all layers exactly."""
    expected, expected_evaluation = one_device
    config = replace(config, precision=replace(config.precision, remat=remat))
    split, evaluation = run_split(config, parallel, batches, start)
    np.testing.assert_allclose(evaluation, expected_evaluation, rtol=1e-5)
    for (state, metrics), (want_state, want) in zip(split, expected, strict=True):
        for name in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
            np.testing.assert_allclose(metrics[name], want[name], rtol=1e-5)
        np.testing.assert_array_equal(metrics["counts"], want["counts"])
        chex.assert_trees_all_equal(state.router_bias, want_state.router_bias)
    (state, _), (want_state, _) = split[0], expected[0]
    # The first moments of the first step are the clipped gradients, times 1 - beta1.
    assert_leaves_close(state.opt_state.mean, want_state.opt_state.mean)
    assert_leaves_close(state.params, want_state.params)


def assert_leaves_close(got, expected):
    got = dict(jax.tree_util.tree_leaves_with_path(got))
    for path, want in jax.tree_util.tree_leaves_with_path(expected):
        error = np.linalg.norm(got[path] - want) / np.linalg.norm(want)
        assert error <= 1e-5, (jax.tree_util.keystr(path), error)

"""Cross-entropy of rows: the definition against float64, the kernel interpreted and on a GPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cross_entropy import cross_entropy_rows
from pallas_kernels.cross_entropy.gpu import Config, cross_entropy_rows_hopper


def draw(num_rows, vocab):
    """Logits of different sizes, one of them far above the rest, targets at both ends too."""
    rng = np.random.default_rng()
    logits_XV = rng.normal(0, rng.uniform(0.1, 20, (num_rows, 1)), (num_rows, vocab))
    logits_XV[0, rng.integers(vocab)] = 1e4
    targets_X = rng.integers(0, vocab, num_rows)
    targets_X[:2] = 0, vocab - 1
    weights_X = rng.uniform(0, 2, num_rows) * (rng.random(num_rows) < 0.8)
    return logits_XV.astype(np.float32), targets_X.astype(np.int32), weights_X.astype(np.float32)


def in_float64(logits_XV, targets_X, weights_X):
    z_XV = logits_XV.astype(np.float64)
    z_XV -= z_XV.max(1, keepdims=True)
    p_XV = np.exp(z_XV) / np.exp(z_XV).sum(1, keepdims=True)
    rows = np.arange(len(targets_X))
    loss_X = (np.log(np.exp(z_XV).sum(1)) - z_XV[rows, targets_X]) * weights_X
    p_XV[rows, targets_X] -= 1
    return loss_X, p_XV * weights_X[:, None]


def check(function, num_rows, vocab):
    operands = draw(num_rows, vocab)
    loss_X, d_logits_XV = jax.jit(function)(*operands)
    expected_X, expected_XV = in_float64(*operands)
    np.testing.assert_allclose(loss_X, expected_X, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(d_logits_XV, expected_XV, rtol=2e-4, atol=2e-6)


SHAPES = [(5, 64), (7, 200), (4, 129)]


@pytest.mark.parametrize(("num_rows", "vocab"), SHAPES)
def test_definition_equals_float64(num_rows, vocab):
    check(partial(cross_entropy_rows, dtype=jnp.float32, implementation="reference"),
          num_rows, vocab)  # fmt: skip


@pytest.mark.parametrize(("num_rows", "vocab"), SHAPES)
def test_interpreted_kernel_equals_float64(num_rows, vocab):
    kernel = partial(cross_entropy_rows_hopper, dtype=jnp.float32, config=Config(columns=64))
    check(partial(kernel, interpret=True), num_rows, vocab)


def test_gradient_is_rounded_to_its_format():
    operands = draw(4, 300)
    found = [
        function(*operands, jnp.bfloat16)[1]
        for function in (
            partial(cross_entropy_rows, implementation="reference"),
            partial(cross_entropy_rows_hopper, interpret=True, config=Config(columns=128)),
        )
    ]
    assert found[0].dtype == found[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(*[np.asarray(x, np.float32) for x in found], rtol=1e-2, atol=1e-6)


def test_what_the_kernel_does_not_take():
    logits_XV, targets_X, weights_X = draw(2, 8)
    with pytest.raises(NotImplementedError, match="float32 logits, not bfloat16"):
        cross_entropy_rows_hopper(
            jnp.asarray(logits_XV, jnp.bfloat16), targets_X, weights_X, jnp.bfloat16
        )
    with pytest.raises(NotImplementedError, match="0 x 8 logits"):
        cross_entropy_rows_hopper(logits_XV[:0], targets_X[:0], weights_X[:0], jnp.float32)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("vocab", [32768, 129280])
def test_on_the_chip(vocab):
    check(partial(cross_entropy_rows, dtype=jnp.float32, implementation="hopper"), 300, vocab)

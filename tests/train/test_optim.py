"""AdamW against a float64 reading of its definition, and against optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsv3_jax.config import OptimConfig
from dsv3_jax.train.optim import adamw, clip_by_global_norm, decay_mask

CONFIG = OptimConfig()
STEPS = 6


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        "norm": {"gain": (scale * rng.normal(size=(3, 5))).astype(np.float32)},  # stacked gains
        "wo": {"kernel": (scale * rng.normal(size=(5, 7))).astype(np.float32)},
    }


def rate(step):
    return 1e-2 * (step + 1) / STEPS


def run(moments_dtype):
    params = jax.tree.map(jnp.asarray, tree(0))
    optimizer = adamw(CONFIG, moments_dtype)
    state = optimizer.init(params)
    update = jax.jit(lambda g, s, p, lr: optimizer.update(g, s, p, learning_rate=lr))
    for step in range(STEPS):
        updates, state = update(tree(1 + step, 1e-3), state, params, jnp.float32(rate(step)))
        params = optax.apply_updates(params, updates)
    return params, state


def test_matches_float64_definition():
    """The written-out AdamW: bias correction, decoupled decay of rate * 0.1, gains not decayed."""
    params, _ = run(jnp.float32)
    for group, name in (("norm", "gain"), ("wo", "kernel")):
        p = tree(0)[group][name].astype(np.float64)
        m = v = np.zeros_like(p)
        for step in range(STEPS):
            g = tree(1 + step, 1e-3)[group][name].astype(np.float64)
            m = 0.9 * m + 0.1 * g
            v = 0.95 * v + 0.05 * g * g
            direction = m / (1 - 0.9 ** (step + 1)) / (np.sqrt(v / (1 - 0.95 ** (step + 1))) + 1e-8)
            if name == "kernel":
                direction += 0.1 * p
            p = p - rate(step) * direction
        np.testing.assert_allclose(params[group][name], p, rtol=2e-6)


def test_matches_optax_with_float32_moments():
    params, _ = run(jnp.float32)
    expected = jax.tree.map(jnp.asarray, tree(0))
    reference = optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        learning_rate=0.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decay_mask
    )
    state = reference.init(expected)
    for step in range(STEPS):
        state.hyperparams["learning_rate"] = rate(step)
        updates, state = reference.update(tree(1 + step, 1e-3), state, expected)
        expected = optax.apply_updates(expected, updates)
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bfloat16_moments_are_rounded_float32_moments():
    """Only the storage is bfloat16: one step stores the rounded float32 moment, masters stay
    float32 and close to the float32 run."""
    params, state = run(jnp.bfloat16)
    reference, _ = run(jnp.float32)
    assert {x.dtype for x in jax.tree.leaves((state.mean, state.variance))} == {
        jnp.dtype("bfloat16")
    }
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-4)
        assert np.any(np.asarray(got) != np.asarray(want))

    optimizer = adamw(CONFIG, jnp.bfloat16)
    start = jax.tree.map(jnp.asarray, tree(0))
    updates, state = optimizer.update(tree(1), optimizer.init(start), start, learning_rate=1.0)
    gradient = tree(1)["norm"]["gain"]
    # The first step of Adam is the sign of the gradient, from moments not yet rounded.
    np.testing.assert_allclose(updates["norm"]["gain"], -np.sign(gradient), rtol=1e-4)
    np.testing.assert_array_equal(
        state.mean["norm"]["gain"],
        (np.float32(1 - 0.9) * gradient).astype(jnp.bfloat16),
    )


def test_weight_decay_spares_gains():
    mask = decay_mask(tree(0))
    assert mask == {"norm": {"gain": False}, "wo": {"kernel": True}}


@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_clip_is_by_the_global_norm(scale):
    grads = tree(3, scale)
    flat = np.concatenate([x.ravel().astype(np.float64) for x in jax.tree.leaves(grads)])
    clipped, norm = clip_by_global_norm(grads, 1.0)
    np.testing.assert_allclose(norm, np.linalg.norm(flat), rtol=1e-6)
    got = np.concatenate([np.ravel(x) for x in jax.tree.leaves(clipped)])
    np.testing.assert_allclose(got, flat * min(1.0, 1.0 / np.linalg.norm(flat)), rtol=1e-6)

"""MLA: the naive form against a per-head float64 reading of spec §2, the absorbed against both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import YarnConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import rope
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.runtime import Runtime

B, T = 2, 9
BASE = dataclasses.replace(
    tiny().model,
    width=24,
    num_heads=3,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=8,
    q_latent_dim=10,
    kv_latent_dim=12,
    init_std=0.4,
)
YARN = YarnConfig(enabled=True, original_length=16)
CHANGES = {
    "v3_like": {},
    "no_query_latent": {"q_latent_dim": None},
    "yarn": {"yarn": YARN},
    "narrow_values": {"v_head_dim": 3, "num_heads": 2},
    "wide_values": {"v_head_dim": 20, "qk_nope_head_dim": 4, "q_latent_dim": None, "yarn": YARN},
}


def module_and_input(config, seed=0):
    """Random weights, gains included, and a random input."""
    mla = MLA(config, runtime=Runtime(), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for norm in [mla.kv_norm] + ([mla.q_norm] if config.q_latent_dim else []):
        norm.gain[...] = jnp.asarray(rng.uniform(0.5, 1.5, norm.gain.shape), jnp.float32)
    return mla, rng.standard_normal((B, T, config.width)).astype(np.float32)


def reference(mla, x_BTD):
    """Spec §2, one head, one query at a time."""
    c = mla.config
    P, R, H = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    weight = lambda linear: np.asarray(linear.kernel[...], np.float64)  # noqa: E731

    def norm(x, gain):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon)
        return x * np.asarray(gain[...], np.float64)

    def turned(x_TR):
        angles = np.arange(T)[:, None] * rope.inverse_frequencies(c).astype(np.float64)
        z = (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(T, R)

    y = np.zeros((B, T, c.width))
    for b in range(B):
        h = x_BTD[b].astype(np.float64)
        if c.q_latent_dim is None:
            q = h @ weight(mla.wq)
        else:
            q = norm(h @ weight(mla.wq_a), mla.q_norm.gain) @ weight(mla.wq_b)
        down = h @ weight(mla.wkv_a)
        k_rope = turned(down[:, c.kv_latent_dim :])
        kv = norm(down[:, : c.kv_latent_dim], mla.kv_norm.gain) @ weight(mla.wkv_b)
        heads = []
        for n in range(c.num_heads):
            q_n = q[:, n * (P + R) : (n + 1) * (P + R)]
            kv_n = kv[:, n * (P + H) : (n + 1) * (P + H)]
            query = np.concatenate([q_n[:, :P], turned(q_n[:, P:])], -1)
            key = np.concatenate([kv_n[:, :P], k_rope], -1)
            o = np.zeros((T, H))
            for t in range(T):
                a = rope.softmax_scale(c) * key[: t + 1] @ query[t]
                p = np.exp(a - a.max())
                o[t] = (p / p.sum()) @ kv_n[: t + 1, P:]
            heads.append(o)
        y[b] = np.concatenate(heads, -1) @ weight(mla.wo)
    return y


@pytest.mark.parametrize("name", CHANGES)
def test_naive_equals_the_spec_and_absorbed_equals_naive(name):
    config = dataclasses.replace(BASE, **CHANGES[name])
    mla, x_BTD = module_and_input(config)
    graphdef, state = nnx.split(mla)

    @jax.jit
    def both(state, x_BTD):
        mla = nnx.merge(graphdef, state)
        cos_sin = rope.cos_sin(rope.positions(T), config)
        cache = mla.latents(x_BTD, cos_sin).padded(T + 3)
        visible_TS = jnp.arange(T + 3)[None] <= jnp.arange(T)[:, None]
        return mla(x_BTD, cos_sin=cos_sin), mla.absorbed(x_BTD, cache, cos_sin, visible_TS), cache

    naive, absorbed, cache = both(state, x_BTD)
    expected = reference(mla, x_BTD)
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(naive, expected, atol=tolerance)
    np.testing.assert_allclose(absorbed, naive, atol=tolerance)
    # L + R numbers a token, nothing per head (spec §2).
    numbers = sum(x.shape[-1] for x in cache)
    assert numbers == config.kv_latent_dim + config.qk_rope_head_dim


def test_weights_of_the_query_path():
    with_latent, _ = module_and_input(BASE)
    without, _ = module_and_input(dataclasses.replace(BASE, q_latent_dim=None))
    names = {key[0] for key, _ in nnx.to_flat_state(nnx.state(with_latent))}
    assert names == {"wq_a", "q_norm", "wq_b", "wkv_a", "kv_norm", "wkv_b", "wo"}
    names = {key[0] for key, _ in nnx.to_flat_state(nnx.state(without))}
    assert names == {"wq", "wkv_a", "kv_norm", "wkv_b", "wo"}
    assert without.wq.kernel.shape == (24, 3 * (8 + 6))

"""Decoding with the latent cache against teacher forcing, seeds, meshes and bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import YarnConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.errors import UserError
from dsv3_jax.model.generate import _decode, _prefill
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3

CONFIG = dataclasses.replace(
    tiny().model,
    vocab_size=64,
    width=32,
    num_layers=3,
    dense_ffn_width=48,
    expert_ffn_width=16,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    q_latent_dim=20,
    kv_latent_dim=12,
    mtp_depth=1,
    yarn=YarnConfig(enabled=True, original_length=8, factor=4.0),
    init_std=0.3,
)
B, T, NEW = 3, 5, 7


@functools.cache
def make_model(config=CONFIG, **runtime):
    model = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=Runtime(**runtime), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def value(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        return jnp.asarray(1.0 + 0.1 * noise if "gain" in name else config.init_std * noise)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))


def prompt(seed=0):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (B, T)).astype(np.int32)


def test_greedy_tokens_are_the_argmax_of_teacher_forcing():
    model = make_model()
    tokens = np.asarray(model.generate(prompt(), max_new_tokens=NEW))
    assert tokens.shape == (B, T + NEW) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, :T], prompt())
    best = np.asarray(model(tokens)).argmax(-1)
    np.testing.assert_array_equal(tokens[:, T:], best[:, T - 1 : -1])
    assert len(np.unique(tokens[:, T:])) > NEW  # rows differ and do not repeat one token


def test_decoding_fills_the_cache_as_a_prefill_would():
    """Compares numbers, where the tokens above compare only the largest logit."""
    model = make_model()
    graphdef, state = nnx.split(model)
    logits, caches = _prefill(graphdef, state, jnp.asarray(prompt()), T + NEW - 1)
    # L + R numbers a token and layer (spec §2).
    assert {name: jax.tree.map(jnp.shape, tuple(c)) for name, c in caches.items()} == {
        "dense_blocks": ((1, B, T + NEW - 1, 12), (1, B, T + NEW - 1, 4)),
        "moe_blocks": ((2, B, T + NEW - 1, 12), (2, B, T + NEW - 1, 4)),
    }
    args = (logits, T, jax.random.key(0), jnp.float32(0.0), NEW, True)
    new_tokens, filled = _decode(graphdef, state, caches, *args)
    tokens = np.concatenate([prompt(), new_tokens], axis=1)
    forced = np.asarray(model(tokens))
    np.testing.assert_allclose(logits, forced[:, T - 1], atol=1e-4)
    _, expected = _prefill(graphdef, state, jnp.asarray(tokens[:, :-1]), T + NEW - 1)
    for name in filled:
        for got, want in zip(filled[name], expected[name], strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4, err_msg=name)


def test_sampling_follows_seed_temperature_and_softmax():
    model, rows = make_model(), 1024
    repeated = np.repeat(prompt()[:1], rows, axis=0)
    first = np.asarray(model.generate(repeated, max_new_tokens=NEW, temperature=2.0, seed=1))
    again = model.generate(repeated, max_new_tokens=NEW, temperature=2.0, seed=1)
    other = model.generate(repeated, max_new_tokens=NEW, temperature=2.0, seed=2)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    # So hot that the noise alone decides: it differs from row to row and from step to step.
    hot = np.asarray(model.generate(repeated, max_new_tokens=NEW, temperature=1e6, seed=1))[:, T:]
    assert len(np.unique(hot[:, 0])) == CONFIG.vocab_size
    assert (hot[:, 1:] == hot[:, :-1]).mean() < 0.05
    logits = np.asarray(model(prompt()[:1]))[0, -1].astype(np.float64) / 2.0
    p = np.exp(logits - logits.max())
    p /= p.sum()
    share = np.bincount(first[:, T], minlength=CONFIG.vocab_size) / rows
    assert np.abs(share - p).max() < 5 * np.sqrt(p.max() / rows)
    cold = model.generate(repeated, max_new_tokens=NEW, temperature=1e-5, seed=1)
    greedy = model.generate(prompt(), max_new_tokens=NEW)
    np.testing.assert_array_equal(cold, np.repeat(greedy[:1], rows, axis=0))


def test_a_mesh_that_the_rows_do_not_divide():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))
    expected = make_model().generate(prompt(), max_new_tokens=NEW)
    on_mesh = make_model(mesh=mesh).generate(prompt(), max_new_tokens=NEW)
    np.testing.assert_array_equal(on_mesh, expected)


def test_bfloat16_decoding_agrees_with_its_prefill():
    config = dataclasses.replace(CONFIG, num_layers=1, num_dense_layers=0)
    model = make_model(config, compute_dtype=jnp.dtype("bfloat16"))
    graphdef, state = nnx.split(model)
    logits, caches = _prefill(graphdef, state, jnp.asarray(prompt()), T + 1)
    assert {x.dtype for x in jax.tree.leaves(caches)} == {jnp.dtype("bfloat16")}
    args = (logits, T, jax.random.key(0), jnp.float32(0.0), 2, True)
    new_tokens, filled = _decode(graphdef, state, caches, *args)
    tokens = jnp.concatenate([prompt(), new_tokens], axis=1)
    forced, _ = _prefill(graphdef, state, tokens[:, :-1], T + 1)
    chosen = np.take_along_axis(np.asarray(forced), np.asarray(new_tokens[:, 1:]), axis=1)[:, 0]
    assert np.all(chosen > forced.max(-1) - 0.1 * np.abs(forced).max())


@pytest.mark.parametrize(
    "tokens, options, message",
    [
        ([[1, 64]], {}, "token 64; the model's vocabulary is 0..63"),
        ([[1, -2]], {}, "token -2; the model's vocabulary is 0..63"),
        ([1, 2], {}, r"int64 \[2\]; it must be integers \[rows, tokens\]"),
        ([[0.5]], {}, "float64"),
        (np.zeros((2, 0), np.int32), {}, "at least one token"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 is too small"),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0 is negative"),
    ],
)
def test_bad_input_is_refused(tokens, options, message):
    with pytest.raises(UserError, match=message):
        make_model().generate(np.asarray(tokens), **options)


def test_speculative_generation():
    model = make_model()
    plain = model.generate(prompt(), max_new_tokens=NEW)
    drafted = model.generate(prompt(), max_new_tokens=NEW, speculative=True)
    assert drafted.dtype == jnp.int32
    np.testing.assert_array_equal(drafted, plain)
    repeated = np.repeat(prompt()[:1], B, axis=0)
    hot = {"max_new_tokens": NEW, "temperature": 2.0, "speculative": True}
    first = np.asarray(model.generate(repeated, seed=1, **hot))
    np.testing.assert_array_equal(first, model.generate(repeated, seed=1, **hot))
    assert not np.array_equal(first, model.generate(repeated, seed=2, **hot))
    assert len(np.unique(first, axis=0)) == B  # rows of one prompt differ


def test_speculation_needs_an_mtp_module():
    model = make_model(dataclasses.replace(CONFIG, mtp_depth=0))
    with pytest.raises(UserError, match="no MTP module to draft with"):
        model.generate(prompt(), speculative=True)

"""MLA of sequences split over `context` against the unsharded module, and what it holds."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from dsv3_jax.config import ParallelConfig, YarnConfig
from dsv3_jax.configs.deepseek_v3_671b import deepseek_v3_671b
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import attention_context, rope
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.context import balanced, mirrored, token_spec
from dsv3_jax.parallel.mesh import make_mesh

B, T = 2, 96
CONFIG = dataclasses.replace(
    tiny().model,
    width=24,
    num_heads=3,
    qk_nope_head_dim=8,
    qk_rope_head_dim=6,
    v_head_dim=10,
    q_latent_dim=10,
    kv_latent_dim=12,
    init_std=0.4,
    yarn=YarnConfig(enabled=True, original_length=32),
)


def weights_and_input(seed):
    mla = MLA(CONFIG, runtime=Runtime(), rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for norm in (mla.kv_norm, mla.q_norm):
        norm.gain[...] = jnp.asarray(rng.uniform(0.5, 1.5, norm.gain.shape), jnp.float32)
    x_BTD, dy_BTD = rng.standard_normal((2, B, T, CONFIG.width)).astype(np.float32)
    segments_BT = np.sort(rng.integers(1, 6, (B, T)), axis=1).astype(np.int32)
    segments_BT[1, -7:] = 0  # padding
    return nnx.to_pure_dict(nnx.state(mla)), x_BTD, dy_BTD, segments_BT


def output_and_gradients(mesh):
    """(weights, x, dy, segments or None) -> y, d weights, dx; all in natural order."""
    runtime = Runtime(mesh=mesh)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: MLA(CONFIG, runtime=runtime, rngs=nnx.Rngs(0))))

    def forward(weights, x_BTD, segments_BT):
        positions_BT = rope.positions(T, segments_BT)
        if segments_BT is not None:
            segments_BT = balanced(segments_BT, mesh)
        cos_sin = rope.cos_sin(balanced(positions_BT, mesh), CONFIG)
        mla = nnx.merge(graphdef, weights)
        y_BTD = mla(balanced(x_BTD, mesh), cos_sin=cos_sin, segments_BT=segments_BT)
        return balanced(y_BTD, mesh)

    @jax.jit
    def both(weights, x_BTD, dy_BTD, segments_BT):
        y_BTD, pull = jax.vjp(lambda w, x: forward(w, x, segments_BT), weights, x_BTD)
        return y_BTD, *pull(dy_BTD)

    return both


@pytest.fixture(scope="module")
def unsharded():
    return output_and_gradients(None)


@pytest.mark.parametrize(("context", "data", "block"), [(8, 1, 512), (4, 2, 4)])
def test_split_attention_equals_the_whole(unsharded, monkeypatch, context, data, block):
    """Output, and the gradients of the input and of every weight, to 1e-5 in float32."""
    monkeypatch.setattr(attention_context, "BLOCK_TOKENS", block)
    split = output_and_gradients(make_mesh(ParallelConfig(context=context, data=data)))
    for seed, has_segments in ((context, False), (context + 1, True)):
        *arguments, segments_BT = weights_and_input(seed)
        arguments.append(segments_BT if has_segments else None)
        expected, got = jax.device_get((unsharded(*arguments), split(*arguments)))
        expected, got = (
            dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (expected, got)
        )
        assert len(got) == 2 + 7
        for path, want in expected.items():
            error = np.abs(got[path] - want).max() / np.abs(want).max()
            assert error <= 1e-5, (jax.tree_util.keystr(path), error)


def test_balanced_order_is_its_own_inverse_and_pairs_early_with_late_chunks():
    x_BT = jnp.arange(2 * 16).reshape(2, 16)
    got = mirrored(x_BT, 4)
    np.testing.assert_array_equal(
        got[0].reshape(4, 2, 2)[:, :, 0] // 2, [[0, 7], [2, 5], [4, 3], [6, 1]]
    )
    chex.assert_trees_all_equal(mirrored(got, 4), x_BT)


@pytest.fixture(scope="module")
def v3_slice():
    """T -> the compiled gradient of V3's attention, in bfloat16, over context 8; never run."""
    config = deepseek_v3_671b().model
    mesh = make_mesh(ParallelConfig(context=8))
    runtime = Runtime(mesh=mesh, compute_dtype=jnp.dtype(jnp.bfloat16))
    graphdef, weights = nnx.split(
        nnx.eval_shape(lambda: MLA(config, runtime=runtime, rngs=nnx.Rngs(0)))
    )

    def compiled(num_tokens):
        def total(weights, x_BTD):
            cos_sin = rope.cos_sin(rope.positions(num_tokens), config)
            y_BTD = nnx.merge(graphdef, weights)(x_BTD, cos_sin=cos_sin)
            return jnp.sum(y_BTD.astype(jnp.float32) ** 2)

        sharding = NamedSharding(mesh, token_spec(mesh, num_tokens))
        shape = (1, num_tokens, config.width)
        x_BTD = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        return jax.jit(jax.grad(total, argnums=(0, 1))).lower(weights, x_BTD).compile()

    return compiled


def test_memory_of_v3_grows_with_the_tokens_and_holds_no_keys_or_values(v3_slice):
    """32K, 64K and 128K tokens, forward and backward, on 8 devices.

    A further token of the sequence costs a device 69 KB, most of it for the queries and outputs of
    its own eighth. Keys and values of all heads would be 66 KB more, their gradients 131 KB.
    """
    lengths = 32768, 65536, 131072
    sizes = [v3_slice(length).memory_analysis().temp_size_in_bytes for length in lengths]
    slopes = np.diff(sizes) / np.diff(lengths)
    assert slopes[1] < 1.2 * slopes[0], sizes  # T x T would double it
    keys_and_values = 128 * (128 + 128) * 2
    assert slopes[1] < 1.25 * keys_and_values, sizes


def test_what_travels_is_the_latents(v3_slice):
    """One all-gather of 576 numbers a token, and one reduce-scatter of as many."""
    program = v3_slice(8192).as_text()
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", program)
    scattered = re.findall(r"= \w+\[([\d,]+)\]\S* reduce-scatter\(", program)
    assert (gathered, scattered) == (["1,8192,576"], ["1,1024,576"])
    assert "all-to-all(" not in program and "collective-permute(" not in program


@pytest.mark.parametrize("num_tokens", [22, 24])
def test_lengths_that_cannot_be_split_stay_whole(num_tokens):
    """The whole model on context 4 x expert 2: logits of 22 tokens as of 24, all to 1e-5."""
    config = dataclasses.replace(tiny().model, num_layers=2, mtp_depth=0)
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, num_tokens))
    mesh = make_mesh(ParallelConfig(context=4, expert=2))
    expected, got = (
        DeepSeekV3(config, runtime=Runtime(mesh=m), rngs=nnx.Rngs(0))(jnp.asarray(tokens_BT))
        for m in (None, mesh)
    )
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())

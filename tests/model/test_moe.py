"""The MoE layer on one device against plain numpy, and what its derivative is made of."""

import dataclasses
import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_reference import choices, relative_error, routed_experts

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.moe import FeedForward, MoE, gated_silu, routed_ffn
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime

CONFIG = dataclasses.replace(
    tiny().model,
    width=32,
    expert_ffn_width=16,
    num_experts=16,
    num_groups_kept=2,
    experts_per_token=3,
    num_shared_experts=2,
    init_std=0.3,
)
X, D, F, E, K = 45, CONFIG.width, CONFIG.expert_ffn_width, CONFIG.num_experts, 3


def operands(pattern="any", seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    ids_XK = choices(rng, X, E, K, pattern)
    weights_XK = rng.uniform(0.1, 1.0, size=(X, K)).astype(np.float32)
    return normal(X, D), ids_XK, weights_XK, normal(E, D, 2 * F), normal(E, F, D), normal(X, D)


@jax.jit
def routed_value_and_gradients(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD):
    def function(x_XD, weights_XK, w13_ED2F, w2_EFD):
        return routed_ffn(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, runtime=Runtime())

    y_XD, transpose = jax.vjp(function, x_XD, weights_XK, w13_ED2F, w2_EFD)
    return y_XD, transpose(dy_XD)


@pytest.mark.parametrize("pattern", ["any", "one_expert", "idle"])
def test_routed_experts_equal_numpy(pattern):
    arrays = operands(pattern)
    y_XD, gradients = routed_value_and_gradients(*arrays)
    expected_y, expected_gradients = routed_experts(*arrays)
    assert relative_error(y_XD, expected_y) <= 1e-5
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected) <= 1e-5


def test_choices_that_belong_to_no_expert_are_skipped():
    x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD = operands()
    ids_XK[::2, 1], ids_XK[7] = E, E  # one choice of every other token, all choices of one
    arrays = (x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD)
    y_XD, gradients = routed_value_and_gradients(*arrays)
    expected_y, expected_gradients = routed_experts(*arrays)
    assert relative_error(y_XD, expected_y) <= 1e-5 and not np.any(y_XD[7])
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected) <= 1e-5


def test_weight_multiplies_before_the_down_projection():
    # With the identity as W2, bf16 output is bf16(silu(gate) up weight): one rounding. A weight
    # applied afterwards would round twice.
    rng = np.random.default_rng(0)
    x_XD = jnp.asarray(rng.normal(size=(64, 16)), jnp.bfloat16)
    w13_ED2F = rng.normal(size=(1, 16, 32)).astype(np.float32)
    weights_XK = rng.uniform(0.1, 1.0, size=(64, 1)).astype(np.float32)
    ids_XK, w2_EFD = np.zeros((64, 1), np.int32), np.eye(16, dtype=np.float32)[None]
    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16))
    run = jax.jit(partial(routed_ffn, runtime=runtime))
    y_XD = run(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD)
    h_X2F = jnp.matmul(
        x_XD, w13_ED2F[0].astype(jnp.bfloat16), preferred_element_type=jnp.float32
    ).astype(jnp.bfloat16)
    inside, outside = gated_silu(h_X2F, weights_XK), gated_silu(h_X2F) * weights_XK
    assert (y_XD == inside).all()
    assert (y_XD != outside.astype(jnp.bfloat16)).mean() > 0.1


@functools.cache
def make_layer(**replacements):
    config = dataclasses.replace(CONFIG, **replacements)
    layer = MoE(config, runtime=Runtime(), rngs=nnx.Rngs(0))
    layer.router.bias[...] = jnp.linspace(-0.2, 0.2, E)
    graphdef, params, bias = nnx.split(layer, nnx.Param, RouterBias)
    u_BTD = jax.random.normal(jax.random.key(1), (3, 15, D))
    return (lambda params, *inputs: nnx.merge(graphdef, params, bias)(*inputs)), params, u_BTD


@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_layer_is_shared_plus_weighted_routed(num_shared_experts):
    function, params, u_BTD = make_layer(num_shared_experts=num_shared_experts)
    weights = nnx.to_pure_dict(params)
    assert weights["experts"]["w13"].shape == (E, D, 2 * F)
    assert ("shared" in weights) == bool(num_shared_experts)
    y_BTD, stats = jax.jit(function)(params, u_BTD)
    u_XD = np.asarray(u_BTD, np.float64).reshape(-1, D)
    scores_XE = 1 / (1 + np.exp(-u_XD @ np.asarray(weights["router"]["kernel"], np.float64)))
    biased_XGE = (scores_XE + np.linspace(-0.2, 0.2, E)).reshape(-1, 4, 4)
    group_score_XG = np.sort(biased_XGE, axis=-1)[..., -2:].sum(-1)
    dropped_XG = np.argsort(group_score_XG, axis=-1)[:, :2]
    np.put_along_axis(biased_XGE, dropped_XG[..., None], -np.inf, axis=1)
    ids_XK = np.argsort(-biased_XGE.reshape(-1, E), axis=-1)[:, :K]
    g_XK = np.take_along_axis(scores_XE, ids_XK, -1)
    g_XK *= CONFIG.routed_scaling_factor / g_XK.sum(-1, keepdims=True)
    experts = weights["experts"]
    expected, _ = routed_experts(u_XD, ids_XK, g_XK, experts["w13"], experts["w2"], u_XD)
    if num_shared_experts:
        assert weights["shared"]["w13"]["kernel"].shape == (D, 2 * 2 * F)
        shared = (np.asarray(weights["shared"][w]["kernel"], np.float64) for w in ("w13", "w2"))
        w13_D2F, w2_FD = shared
        gate, up = np.split(u_XD @ w13_D2F, 2, axis=-1)
        expected += gate / (1 + np.exp(-gate)) * up @ w2_FD
    assert relative_error(y_BTD.reshape(-1, D), expected) <= 1e-5
    np.testing.assert_array_equal(stats.counts_E, np.bincount(ids_XK.ravel(), minlength=E))


def test_feed_forward_equals_numpy():
    module = FeedForward(nnx.Rngs(0), D, F, 0.3, Runtime())
    x_XD = np.random.default_rng(0).normal(size=(7, D))
    gate, up = np.split(x_XD @ np.asarray(module.w13.kernel[...], np.float64), 2, axis=-1)
    expected = gate / (1 + np.exp(-gate)) * up @ np.asarray(module.w2.kernel[...], np.float64)
    assert relative_error(module(x_XD.astype(np.float32)), expected) <= 1e-5


def test_only_counts_and_losses_see_the_token_mask():
    function, params, u_BTD = make_layer()
    mask_BT = np.arange(15) < np.array([[15], [9], [4]])
    run = jax.jit(function)
    (y_BTD, stats), (masked_y_BTD, masked_stats) = (
        run(params, u_BTD, mask) for mask in (np.ones_like(mask_BT), mask_BT)
    )
    np.testing.assert_array_equal(y_BTD, masked_y_BTD)
    assert stats.counts_E.sum() == 45 * K and masked_stats.counts_E.sum() == 28 * K


def gradient_of(function, policy=None):
    layer = function if policy is None else jax.checkpoint(function, policy=policy)

    def loss(params, u_BTD):
        y_BTD, stats = layer(params, u_BTD)
        return jnp.sum(y_BTD**2) + stats.sequence_loss

    return jax.grad(loss, argnums=(0, 1))


def test_derivative_gathers_and_never_scatters_adds():
    function, params, u_BTD = make_layer()
    program = str(jax.make_jaxpr(gradient_of(function))(params, u_BTD))
    assert "gather" in program and "scatter-add" not in program
    assert len(re.findall(r"\bsort\[", program)) == 1


def test_kept_names_spare_the_sort_and_the_choice():
    function, params, u_BTD = make_layer()
    policies = jax.checkpoint_policies
    kept = policies.save_only_these_names("routing", "expert_in", "w13_out")
    plain, recomputing, sparing = (
        jax.jit(gradient_of(function, policy)).trace(params, u_BTD)
        for policy in (None, policies.nothing_saveable, kept)
    )
    for op in (r"\bsort\[", r"\btop_k\["):
        count = [len(re.findall(op, str(t.jaxpr))) for t in (plain, recomputing, sparing)]
        assert count[0] == count[2] < count[1]
    results = (t.lower().compile()(params, u_BTD) for t in (plain, sparing))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *results)


def test_products_of_swiglu_and_norms_keep_no_float32():
    """What lies between bfloat16 arrays is made again in the backward pass."""
    norm, h_X2F = RMSNorm(64, 1e-6), jax.random.normal(jax.random.key(0), (32, 64), jnp.bfloat16)

    def kept(function):
        _, pull = jax.vjp(function, h_X2F)
        return [(x.dtype, x.size) for x in jax.tree.leaves(pull) if jnp.size(x) >= 32 * 8]

    for function in (gated_silu, norm):
        assert kept(function) == [(jnp.bfloat16, 32 * 64)]

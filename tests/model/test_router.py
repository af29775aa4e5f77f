"""The router against a plain numpy reading of spec §3, and one test for each of its traps."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import router
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.mesh import batch_sharding

V3 = dataclasses.replace(
    tiny().model, num_experts=16, num_groups=4, num_groups_kept=2, experts_per_token=3
)
V2 = dataclasses.replace(
    V3,
    group_score="max",
    affinity="softmax",
    normalize_weights=False,
    routed_scaling_factor=16.0,
)
UNGROUPED = dataclasses.replace(V3, num_groups=1, num_groups_kept=1)
CONFIGS = {"v3": V3, "v2": V2, "ungrouped": UNGROUPED}

choose = jax.jit(router.choose_experts, static_argnums=2)
mix = jax.jit(router.mixing_weights, static_argnums=2)
load_stats = jax.jit(router.load_stats, static_argnums=2)
affinities = jax.jit(router.affinities, static_argnums=1)


def make_scores(config, shape, seed=0):
    logits = np.random.default_rng(seed).normal(size=(*shape, config.num_experts))
    return affinities(logits.astype(np.float32), config)


def numpy_choice(scores_E, bias_E, config):
    """Steps 2-4 of spec §3 for one token, by sorting lists."""
    biased = np.asarray(scores_E, np.float64) + np.asarray(bias_E, np.float64)
    group_size = config.num_experts // config.num_groups

    def group_score(group):
        members = sorted(biased[group * group_size : (group + 1) * group_size], reverse=True)
        return members[0] + members[1] if config.group_score == "top2_sum" else members[0]

    groups = sorted(range(config.num_groups), key=lambda g: (-group_score(g), g))
    kept = groups[: config.num_groups_kept]
    allowed = [e for e in range(config.num_experts) if e // group_size in kept]
    return sorted(allowed, key=lambda e: (-biased[e], e))[: config.experts_per_token]


def numpy_losses(scores_BTE, ids_BTK, mask_BT, config):
    """The four balance losses, sequence by sequence, as spec §3 prints them."""
    e, k = config.num_experts, config.experts_per_token
    g, kept = config.num_groups, config.num_groups_kept
    losses = []
    for scores_TE, ids_TK, mask_T in zip(scores_BTE, ids_BTK, mask_BT, strict=True):
        scores_TE, ids_TK = np.asarray(scores_TE, np.float64)[mask_T], ids_TK[mask_T]
        t = len(scores_TE)
        raw_TK = np.argsort(-scores_TE, axis=-1, kind="stable")[:, :k]
        raw_f = e / (k * t) * np.bincount(raw_TK.ravel(), minlength=e)
        f = e / (k * t) * np.bincount(ids_TK.ravel(), minlength=e)
        share = (scores_TE / scores_TE.sum(-1, keepdims=True)).mean(0)
        p = scores_TE.mean(0)
        p_group = p.reshape(g, -1).sum(-1)
        sent = [sum(group in row // (e // g) for row in ids_TK) for group in range(g)]
        losses.append(
            [
                raw_f @ share,
                f @ p,
                f.reshape(g, -1).mean(-1) @ p_group,
                g / (kept * t) * np.array(sent) @ p_group,
            ]
        )
    return np.mean(losses, axis=0)


@pytest.mark.parametrize("bias_mean", [0.0, -3.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_choice_and_weights_equal_the_numpy_reading(name, bias_mean):
    config = CONFIGS[name]
    scores_XE = make_scores(config, (200,))
    # A bias of mean -3 makes every biased score negative: a masked group at 0 would win.
    bias_E = np.random.default_rng(1).normal(bias_mean, 0.3, config.num_experts)
    bias_E = bias_E.astype(np.float32)
    ids_XK = np.asarray(choose(scores_XE, bias_E, config))
    weights_XK = np.asarray(mix(scores_XE, jnp.asarray(ids_XK), config))
    if bias_mean < 0:
        assert (scores_XE + bias_E < 0).all()
    for scores_E, ids_K, weights_K in zip(np.asarray(scores_XE), ids_XK, weights_XK, strict=True):
        assert list(ids_K) == numpy_choice(scores_E, bias_E, config)
        expected_K = scores_E[ids_K].astype(np.float64)
        if config.normalize_weights:
            expected_K /= expected_K.sum()
        np.testing.assert_allclose(weights_K, config.routed_scaling_factor * expected_K, rtol=1e-6)


def test_equal_scores_go_to_the_lowest_expert():
    ids_K = choose(jnp.full((16,), 0.5), np.zeros(16), V3)
    assert list(np.asarray(ids_K)) == [0, 1, 2]


def test_bias_moves_the_choice_but_no_weight_and_no_raw_loss():
    scores_BTE = make_scores(V3, (2, 40))
    bias_E = 10.0 * (np.arange(16) == 5)
    plain_ids = np.asarray(choose(scores_BTE, np.zeros(16), V3))
    biased_ids = np.asarray(choose(scores_BTE, bias_E, V3))
    assert (biased_ids[..., 0] == 5).all() and not (plain_ids == 5).any(-1).all()
    weights_BTK = np.asarray(mix(scores_BTE, biased_ids, V3))
    np.testing.assert_allclose(weights_BTK.sum(-1), V3.routed_scaling_factor, rtol=1e-6)
    # Expert 5 won by its bias: its weight still follows its affinity.
    assert (weights_BTK[..., 0] < weights_BTK[..., 1]).any()
    plain, biased = (load_stats(scores_BTE, ids, V3) for ids in (plain_ids, biased_ids))
    assert plain.sequence_loss == biased.sequence_loss
    assert biased.counts_E[5] == 80 and plain.counts_E[5] < 80


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_equal_the_numpy_reading(name, masked):
    config = CONFIGS[name]
    scores_BTE = make_scores(config, (3, 21))
    ids_BTK = choose(scores_BTE, np.linspace(-1, 1, 16), config)
    mask_BT = np.arange(21) < np.array([[21], [13], [1]]) if masked else np.ones((3, 21), bool)
    stats = load_stats(scores_BTE, ids_BTK, config, jnp.asarray(mask_BT) if masked else None)
    counts_E = np.bincount(np.asarray(ids_BTK)[mask_BT].ravel(), minlength=16)
    np.testing.assert_array_equal(stats.counts_E, counts_E)
    assert stats.counts_E.dtype == jnp.float32
    expected = numpy_losses(np.asarray(scores_BTE), np.asarray(ids_BTK), mask_BT, config)
    np.testing.assert_allclose(np.stack(stats[1:5]), expected, rtol=1e-5)


def test_balance_is_measured_in_each_sequence_not_in_the_batch():
    # Sequence b sends all its tokens to its own experts: the batch is balanced, no sequence is.
    config = dataclasses.replace(UNGROUPED, experts_per_token=4)
    favourite_BE = np.arange(16) // 4 == np.arange(4)[:, None]
    scores_BTE = jnp.asarray(np.where(favourite_BE, 0.9, 0.1)[:, None].repeat(8, 1), jnp.float32)
    ids_BTK = choose(scores_BTE, np.zeros(16), config)
    stats = load_stats(scores_BTE, ids_BTK, config)
    assert (stats.counts_E == 8).all()
    np.testing.assert_allclose(stats.sequence_loss, 4 * 4 * 0.9 / (4 * 0.9 + 12 * 0.1), rtol=1e-6)


def test_perfect_balance_costs_one():
    config = dataclasses.replace(UNGROUPED, experts_per_token=1)
    scores_BTE = jnp.asarray(np.eye(16) * 0.5 + 0.25, jnp.float32)[None]
    ids_BTK = choose(scores_BTE, np.zeros(16), config)
    np.testing.assert_allclose(
        load_stats(scores_BTE, ids_BTK, config).sequence_loss, 1.0, rtol=1e-6
    )


def test_loss_gradient_flows_through_p_with_f_constant():
    scores_BTE = make_scores(V3, (2, 9))
    ids_BTK = choose(scores_BTE, np.zeros(16), V3)
    gradient = jax.jit(jax.grad(lambda s: load_stats(s, ids_BTK, V3).sequence_loss))(scores_BTE)
    scores = np.asarray(scores_BTE, np.float64)
    raw = np.argsort(-scores, axis=-1, kind="stable")[..., :3]
    f_BE = np.stack([np.bincount(r.ravel(), minlength=16) for r in raw]) * 16 / (3 * 9)
    total = scores.sum(-1, keepdims=True)
    mean_f = (f_BE[:, None] * scores).sum(-1, keepdims=True) / total
    expected = (f_BE[:, None] - mean_f) / total / 9 / 2  # d(sum f s/sum(s))/ds, mean over T and B
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["v3", "v2"])
def test_weight_gradient_equals_finite_differences_and_has_no_scatter(name):
    config = CONFIGS[name]
    logits_XE = np.random.default_rng(3).normal(size=(5, 16)).astype(np.float32)
    ids_XK = choose(affinities(logits_XE, config), np.zeros(16), config)
    probe_XK = np.random.default_rng(4).normal(size=(5, 3)).astype(np.float32)

    def weighted(logits_XE):
        scores_XE = affinities(logits_XE, config)
        return jnp.vdot(mix(scores_XE, ids_XK, config), probe_XK)

    def weighted_by_numpy(logits_XE):
        exp = np.exp(logits_XE)
        s = exp / exp.sum(-1, keepdims=True) if name == "v2" else exp / (1 + exp)
        g = np.take_along_axis(s, np.asarray(ids_XK), -1)
        g = g / g.sum(-1, keepdims=True) if config.normalize_weights else g
        return config.routed_scaling_factor * np.sum(g * np.asarray(probe_XK, np.float64))

    point = np.asarray(logits_XE, np.float64)
    numeric = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        step = np.zeros_like(point)
        step[index] = 1e-5
        numeric[index] = weighted_by_numpy(point + step) - weighted_by_numpy(point - step)
    gradient = jax.jit(jax.grad(weighted))(logits_XE)
    np.testing.assert_allclose(gradient, numeric / 2e-5, rtol=1e-4, atol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(weighted))(logits_XE))


def test_bf16_router_keeps_float32_scores_and_weight_gradients():
    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16))
    module = router.Router(V3, runtime=runtime, rngs=nnx.Rngs(0))
    u_BTD = jax.random.normal(jax.random.key(1), (2, 8, V3.width), jnp.bfloat16)
    graphdef, params, bias = nnx.split(module, nnx.Param, router.RouterBias)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def first_weights(params):
        ids_BTK, weights_BTK, _ = nnx.merge(graphdef, params, bias)(u_BTD)
        return weights_BTK[..., 0].sum(), (ids_BTK, weights_BTK)

    u = np.asarray(u_BTD, np.float64)
    kernel = np.asarray(params["kernel"][...].astype(jnp.bfloat16), np.float64)
    scores = 1 / (1 + np.exp(-u @ kernel))
    (_, (ids_BTK, weights_BTK)), gradient = first_weights(params)
    expected = np.take_along_axis(scores, np.asarray(ids_BTK), -1)
    expected *= V3.routed_scaling_factor / expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights_BTK, expected, rtol=1e-6)  # bf16 scores would be off by 1e-3
    assert gradient["kernel"][...].dtype == jnp.float32


def test_update_moves_against_the_load_and_leaves_the_mean_alone():
    counts_LE = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [7.0, 7.0, 7.0, 7.0]])
    bias_LE = jnp.asarray([[0.5, 0.5, 0.5, 0.5], [5.0, -1.0, 0.0, 1.0]])
    updated = router.update_bias(bias_LE, counts_LE, 0.001)
    np.testing.assert_allclose(
        updated, bias_LE + jnp.asarray([[-0.001, 0.001, 0.0, 0.0], [0.0] * 4]), rtol=1e-7
    )
    # In bf16 a step of 0.001 on a bias of 5 would vanish.
    moved = router.update_bias(jnp.asarray([5.0, 5.0]), jnp.asarray([1.0, 3.0]), 0.001)
    np.testing.assert_allclose(moved, [5.001, 4.999], rtol=1e-6)


def test_max_violation():
    counts_LE = jnp.asarray([[4.0, 0.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    np.testing.assert_allclose(router.max_violation(counts_LE), [1.0, 0.0])


def test_bias_sign_follows_the_global_count_of_64_shards():
    """64 rows stand for 64 shards, on 8 devices; then 3 steps of one layer."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))
    module = router.Router(V3, runtime=Runtime(mesh=mesh), rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    replicated = NamedSharding(mesh, PartitionSpec())
    state = jax.device_put(state, replicated)

    @jax.jit
    def step(state, u_BTD):
        module = nnx.merge(graphdef, state)
        ids_BTK, _, stats = module(u_BTD)
        module.bias[...] = router.update_bias(module.bias[...], stats.counts_E, 0.01)
        return nnx.state(module), ids_BTK

    wrong_global, wrong_per_shard = 0, 0
    for seed in range(3):
        u_BTD = jax.random.normal(jax.random.key(seed), (64, 16, V3.width))
        before_E = np.asarray(state["bias"][...])
        state, ids_BTK = step(state, jax.device_put(u_BTD, batch_sharding(mesh)))
        moved_E = np.sign(np.asarray(state["bias"][...]) - before_E)
        count_BE = np.stack([np.bincount(i.ravel(), minlength=16) for i in np.asarray(ids_BTK)])
        sign_E = np.sign(count_BE.sum(0).mean() - count_BE.sum(0))
        # What 64 shards with a sign each would do: the counter-example that the test must see.
        shard_sign_E = np.sign(np.sign(count_BE.mean(-1, keepdims=True) - count_BE).sum(0))
        wrong_global += (moved_E != sign_E).sum()
        wrong_per_shard += (shard_sign_E != sign_E).sum()
    assert wrong_global == 0
    assert wrong_per_shard > 0

"""GRPO beside a float64 reading of spec §10.3, and its gradients on one and on 8 devices."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_policy import small_config, small_mesh

from dsv3_jax.config import GrpoConfig
from dsv3_jax.model.router import ReplayedChoice
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.posttrain.grpo import (
    group_advantages,
    make_score,
    objective,
    policy_losses,
)
from dsv3_jax.posttrain.rollout import Rollout, policy_rows, sample_answers
from dsv3_jax.train.losses import token_logprobs
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_train_step

FORMS = pytest.mark.parametrize("form", ["token", "sequence"])


def j(logprobs, old, reference, lengths, advantages, epsilon, beta, form):
    """J of spec §10.3, answer by answer, float64; `lengths` first positions are the answer's."""
    total = 0.0
    for row, length in enumerate(lengths):
        new, before, ref = (x[row, :length] for x in (logprobs, old, reference))
        if form == "sequence":
            new, before, ref = (np.array([x.sum()]) for x in (new, before, ref))
        terms = []
        for t in range(len(new)):
            ratio = np.exp(new[t] - before[t])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            to_reference = np.exp(ref[t]) / np.exp(new[t])
            kl = to_reference - np.log(to_reference) - 1
            terms.append(min(ratio * advantages[row], clipped * advantages[row]) - beta * kl)
        total += np.mean(terms)
    return total / len(lengths)


def derivative(function, x, step=1e-6):
    """Central differences, float64."""
    out = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        high, low = x.copy(), x.copy()
        high[index] += step
        low[index] -= step
        out[index] = (function(high) - function(low)) / (2 * step)
    return out


@FORMS
@pytest.mark.parametrize("epsilon, beta", [(0.2, 0.04), (10.0, 0.0)])
def test_loss_and_gradient_equal_a_float64_reading(form, epsilon, beta):
    rng = np.random.default_rng()
    lengths, width = [7, 1, 4, 5, 2, 7], 7
    new = -rng.exponential(1.0, (len(lengths), width))
    # Of the same size in both forms: about half of the ratios lie outside 0.8..1.2.
    spread = 0.3 / np.sqrt(np.array(lengths)[:, None]) if form == "sequence" else 0.3
    old, reference = (new + spread * rng.standard_normal(new.shape) for _ in range(2))
    advantages = rng.permutation([1.5, -1.5, 0.7, -0.7, 0.0, 2.0])
    mask = np.arange(width) < np.array(lengths)[:, None]
    config = GrpoConfig(form=form, clip_epsilon=epsilon, kl_weight=beta)

    def loss(logprobs, padding=0.0):
        old_BT, reference_BT = (np.where(mask, x, padding) for x in (old, reference))
        return objective(logprobs, old_BT, reference_BT, mask, advantages, config)

    as_float32 = jnp.asarray(np.where(mask, new, -1e30), jnp.float32)  # padding is out
    value, gradient = jax.value_and_grad(lambda x: loss(x, 1e4).loss)(as_float32)
    wanted = partial(j, old=old, reference=reference, lengths=lengths, advantages=advantages,
                     epsilon=epsilon, beta=beta, form=form)  # fmt: skip
    np.testing.assert_allclose(value, -wanted(new), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, -derivative(wanted, new), rtol=1e-4, atol=1e-6)
    assert not gradient[~mask].any()

    statistics = loss(as_float32)
    kls, clips = [], []
    for row, length in enumerate(lengths):
        logs = [x[row, :length] for x in (new, old, reference)]
        log_new, log_old, log_ref = (
            [x.sum(keepdims=True) for x in logs] if form == "sequence" else logs
        )
        kls.append(np.mean(np.exp(log_ref - log_new) - (log_ref - log_new) - 1))
        gain = advantages[row] > 0
        ratio = np.exp(log_new - log_old)
        outside = ratio > 1 + epsilon if gain else ratio < 1 - epsilon
        clips.append(np.mean(outside & (advantages[row] != 0)))
    np.testing.assert_allclose(statistics.kl, np.mean(kls), rtol=1e-4)
    np.testing.assert_allclose(statistics.clipped, np.mean(clips), rtol=1e-5)


@FORMS
def test_a_clipped_ratio_has_no_gradient_and_the_other_side_keeps_it(form):
    """Ratios of 2 and 1/2, epsilon 0.2: only what would undo the gain still moves."""
    config = GrpoConfig(form=form, clip_epsilon=0.2, kl_weight=0.0)
    old, mask = jnp.zeros((4, 1)), jnp.ones((4, 1), bool)
    new = jnp.log(jnp.asarray([[2.0], [2.0], [0.5], [0.5]]))
    advantages = jnp.asarray([1.0, -1.0, 1.0, -1.0])
    gradient = jax.grad(lambda x: objective(x, old, old, mask, advantages, config).loss)(new)
    np.testing.assert_allclose(gradient[:, 0], [0.0, 2 / 4, -0.5 / 4, 0.0], rtol=1e-6)


@pytest.mark.parametrize("sample_std", [False, True])
def test_advantages_stay_within_their_group(sample_std):
    rng = np.random.default_rng()
    rewards = rng.random((5, 4)).astype(np.float32)
    rewards[1] = 0.1  # equal rewards: no difference to learn from, whatever their mean rounds to
    rewards[3] += 100.0
    got = group_advantages(rewards.ravel(), np.ones(20, bool), 4, sample_std=sample_std)
    for group, advantages in zip(rewards.astype(np.float64), got.reshape(5, 4), strict=True):
        deviations = group - group.sum() / 4
        variance = (deviations**2).sum() / (3 if sample_std else 4)
        wanted = 0.0 if group.min() == group.max() else deviations / np.sqrt(variance)
        np.testing.assert_allclose(advantages, wanted, rtol=1e-5, atol=1e-6)


def test_failed_rewards_are_in_no_mean():
    rewards = np.array([1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0, 0.0], np.float32)
    valid = np.array([1, 1, 0, 1, 0, 0, 1, 0], bool)
    got = group_advantages(rewards, valid, 4)
    kept = np.array([1.0, 0.0, 3.0])
    np.testing.assert_allclose(got[[0, 1, 3]], (kept - kept.mean()) / kept.std(), rtol=1e-6)
    assert not got[2] and not got[4:].any()  # the second group has one answer left


def test_token_logprobs_and_their_gradient():
    """In several chunks, beside log_softmax of the whole logits in float64."""
    rng = np.random.default_rng()
    hidden, head = rng.standard_normal((2, 6, 5)), rng.standard_normal((5, 11))
    targets, weights = rng.integers(0, 11, (2, 6)), rng.standard_normal((2, 6))

    def logprob(hidden, head):
        logits = hidden @ head
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def wanted(hidden, head):
        return (
            np.take_along_axis(logprob(hidden, head), targets[..., None], -1)[..., 0] * weights
        ).sum()

    def weighted(hidden, head):
        logprobs, entropy = token_logprobs(
            hidden, head, jnp.asarray(targets), compute_dtype=jnp.float32, logits_budget=33
        )
        return jnp.sum(logprobs * weights), entropy

    args = jnp.asarray(hidden, jnp.float32), jnp.asarray(head, jnp.float32)
    (value, entropy), gradients = jax.value_and_grad(weighted, (0, 1), has_aux=True)(*args)
    np.testing.assert_allclose(value, wanted(hidden, head), rtol=1e-4, atol=1e-4)
    all_logprobs = logprob(hidden, head)
    np.testing.assert_allclose(
        entropy, -(np.exp(all_logprobs) * all_logprobs).sum(-1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        gradients[0], derivative(lambda x: wanted(x, head), hidden), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        gradients[1], derivative(lambda x: wanted(hidden, x), head), rtol=1e-3, atol=1e-4
    )


CONFIG = small_config(
    run={"num_steps": 2},
    grpo=dict(group_size=4, max_answer_tokens=4, kl_weight=0.5, temperature=1.25),
)


@pytest.fixture(scope="module")
def start():
    """Weights of a policy, of one that has moved on, and of the reference."""
    graphdef, state, _ = init_state(CONFIG, small_mesh(CONFIG))
    state = jax.device_get(state)
    rng = np.random.default_rng()

    def moved(scale):
        return jax.tree.map(
            lambda x: (x + scale * rng.standard_normal(x.shape)).astype(np.float32), state.params
        )

    return graphdef, state, moved(0.03), moved(0.05)


@pytest.fixture(scope="module")
def rollouts(start):
    """Eight answers of unequal lengths, one of them empty, and their advantages."""
    rng = np.random.default_rng()
    sizes = [(3, 4), (5, 1), (8, 5), (1, 9), (2, 0), (4, 7), (6, 2), (7, 6)]
    texts = [
        Rollout(
            prompt=tuple(rng.integers(0, 320, prompt).tolist()),
            answer=tuple(rng.integers(0, 320, answer).tolist()),
            finish_reason="stop" if answer else "error",
        )
        for prompt, answer in sizes
    ]
    rows = policy_rows(texts, CONFIG.data.sequence_length)
    assert rows["mask"].sum(1).tolist() == [answer for _, answer in sizes]
    return texts, rows | {"advantages": rng.standard_normal(8).astype(np.float32)}


@pytest.fixture(scope="module")
def score(start):
    return make_score(start[0], CONFIG.grpo.temperature, routes=True)


@pytest.fixture(scope="module")
def batch(start, rollouts, score):
    """[A = 1, B = 8, ...]: `old` and `reference` of other weights than the updated ones."""
    _, state, moved, reference = start
    batch = {name: x[None] for name, x in rollouts[1].items()}
    texts = {name: batch[name] for name in ("tokens", "segments")}
    old, routes = score(moved, state.router_bias, texts)
    reference, _ = score(reference, state.router_bias, texts)
    return jax.device_get(batch | {"old": old, "reference": reference, "routes": routes})


def one_step(config, batch, start):
    """State and metrics after a step from `start` on the mesh of a config."""
    mesh = small_mesh(config)
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    loss = partial(policy_losses, config=config.grpo)
    step = make_train_step(config, graphdef, shardings, loss=loss)
    state = jax.device_put(start[1], shardings)
    batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
    rate, off = np.float32(0.01), np.float32(0.0)
    return jax.device_get(step(state, batch, rate, off, off))


@pytest.fixture(scope="module")
def one_device(batch, start):
    return one_step(CONFIG, batch, start)


def test_loss_of_a_model_is_that_of_its_logits(batch, start, one_device):
    """With every router choosing as it did for the old policy, from logits at temperature 1.25."""
    graphdef, state, _, _ = start

    @jax.jit
    def logits_of(params, tokens, routes):
        model = nnx.merge(graphdef, params, state.router_bias)
        model.moe_blocks.ffn.router.replay = nnx.data(ReplayedChoice(routes.swapaxes(0, 1)))
        return model.logits(model.hidden_states(tokens, mtp=False)[0])

    tokens = batch["tokens"][0]
    logits = np.float64(logits_of(state.params, tokens[:, :-1], batch["routes"][0])) / 1.25
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at_targets = np.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
    rows = [at_targets, np.float64(batch["old"][0]), np.float64(batch["reference"][0])]
    answers = [[x[i][batch["mask"][0, i]] for x in rows] for i in range(8)]
    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
    total, entropies = 0.0, []
    for i, (new, old, reference) in enumerate(answers):
        if len(new):
            advantages = batch["advantages"][0, i : i + 1].astype(np.float64)
            arrays = (x[None] for x in (new, old, reference))
            total += j(*arrays, [len(new)], advantages, 0.2, 0.5, "token")
            entropies.append(entropy[i][batch["mask"][0, i]].mean())
    _, metrics = one_device
    np.testing.assert_allclose(metrics["loss"], -total / 8, rtol=1e-4)
    np.testing.assert_allclose(metrics["extra"]["entropy"], np.sum(entropies) / 8, rtol=1e-4)
    assert 0 < metrics["extra"]["clipped"] < 1 and metrics["extra"]["kl"] > 0


@pytest.mark.parametrize("mesh", [(2, 4), pytest.param((8, 1), marks=pytest.mark.slow)])
def test_eight_devices_equal_one(batch, start, one_device, mesh):
    """Loss, statistics, counts and every gradient leaf, routes replayed."""
    config = small_config(mesh=mesh, run={"num_steps": 2}, grpo=vars(CONFIG.grpo))
    (state, metrics), (state_1, metrics_1) = one_step(config, batch, start), one_device
    for name in ("loss", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(metrics[name], metrics_1[name], rtol=1e-5)
    for name, value in metrics_1["extra"].items():
        np.testing.assert_allclose(metrics["extra"][name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(metrics["counts"], metrics_1["counts"])
    got = dict(jax.tree_util.tree_leaves_with_path(state.opt_state.mean))
    moved = 0
    for path, want in jax.tree_util.tree_leaves_with_path(state_1.opt_state.mean):
        # Of the clipped gradients, times 1 - beta1.
        assert np.linalg.norm(got[path] - want) <= 1e-5 * np.linalg.norm(want), path
        moved += np.linalg.norm(want) > 0
        assert ("mtp" in jax.tree_util.keystr(path)) == (np.linalg.norm(want) == 0), path
    assert moved > 20


def test_replay_keeps_the_experts_of_the_old_policy(batch, start, score, one_device):
    """Counts of the step are the old policy's; the new weights by themselves choose otherwise."""
    routes, used = batch["routes"][0], batch["segments"][0, :, :-1] > 0
    counts = [np.bincount(routes[:, layer][used].ravel(), minlength=8) for layer in range(1)]
    np.testing.assert_array_equal(one_device[1]["counts"][:1], counts)
    _, state, _, _ = start
    texts = {name: batch[name] for name in ("tokens", "segments")}
    _, own = score(state.params, state.router_bias, texts)
    assert (np.sort(own[0]) != np.sort(routes))[:, 0][used].any()


def test_answers_come_from_the_weights_that_are_handed_over(start):
    """Greedy answers of two states in turn: each token is the most likely one of its own state."""
    graphdef, state, moved, _ = start
    prompts = [[5, 6, 7], [100, 9, 8, 7, 6], [5, 6, 7, 8]]
    forward = jax.jit(lambda params, tokens: nnx.merge(graphdef, params, state.router_bias)(tokens))
    answers = []
    for params in (state.params, moved):
        rollouts = sample_answers(
            nnx.merge(graphdef, jax.device_put(params), jax.device_put(state.router_bias)),
            prompts, group_size=2, max_tokens=4, context_tokens=13, temperature=0.0, seed=0,
            eos_id=1, max_rows=4,
        )  # fmt: skip
        assert [list(r.prompt) for r in rollouts] == [p for p in prompts for _ in range(2)]
        rows = policy_rows(rollouts, CONFIG.data.sequence_length)
        best = np.asarray(forward(params, rows["tokens"][:, :-1])).argmax(-1)
        assert np.all((best == rows["tokens"][:, 1:])[rows["mask"]])
        assert all(len(r.answer) == 4 or r.answer[-1] == 1 for r in rollouts)
        answers.append([r.answer for r in rollouts])
    assert answers[0] != answers[1]

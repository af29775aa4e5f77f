"""Losses against a plain numpy reading of spec §3 and §4."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.config import BalanceConfig
from dsv3_jax.train.losses import (
    balance_loss,
    cross_entropy,
    model_losses,
    targets_and_weights,
)

B, T, D, V = 8, 6, 5, 11


def case(seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(B, T, D)).astype(np.float32),
        rng.normal(size=(D, V)).astype(np.float32),
        rng.integers(0, V, (B, T)).astype(np.int32),
        rng.integers(0, 2, (B, T)).astype(np.float32),
    )


def numpy_loss(hidden, head, targets, weights):
    """Sum of losses and its gradients in float64, written from the definition."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    logits = hidden @ head
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    p = exponents / exponents.sum(-1, keepdims=True)
    picked = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    d_logits = (p - np.eye(V)[targets]) * weights[..., None]
    loss = -(np.log(picked) * weights).sum()
    return loss, d_logits @ head.T, np.einsum("btd,btv->dv", hidden, d_logits)


def value_and_grads(mesh=None, compute_dtype=jnp.float32, budget=2**27):
    hidden, head, targets, weights = case()

    def loss(hidden, head):
        return 3.0 * cross_entropy(
            hidden, head, targets, weights,
            compute_dtype=compute_dtype, mesh=mesh, logits_budget=budget,
        )  # fmt: skip

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)


@pytest.mark.parametrize("budget", [2**27, 16 * V, 7 * V, 1])  # 1, 3, 8 and 48 chunks
@pytest.mark.parametrize("devices", [1, 8])
def test_cross_entropy_and_gradients(budget, devices):
    mesh = None
    if devices > 1:
        mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))
    loss, grads = value_and_grads(mesh, budget=budget)
    expected, *expected_grads = numpy_loss(*case())
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, 3 * want, rtol=1e-5, atol=1e-6)


def test_bfloat16_operands_keep_float32_sums():
    loss, (_, d_head) = value_and_grads(compute_dtype=jnp.bfloat16)
    hidden, head, targets, weights = case()
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, head)]
    expected, _, want = numpy_loss(*rounded, targets, weights)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-6)
    assert d_head.dtype == jnp.float32
    np.testing.assert_allclose(d_head, 3 * want, rtol=2e-2, atol=2e-2)


def test_full_logits_are_never_built():
    """No array of B*T*V numbers appears, in the forward or the backward program."""
    hidden, head, targets, weights = case()
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda h: cross_entropy(
                h, head, targets, weights, compute_dtype=jnp.float32, logits_budget=7 * V
            )
        )
    )(hidden)
    assert f"[{B * T},{V}]" not in str(jaxpr) and f"[{B},{T},{V}]" not in str(jaxpr)
    assert f"[6,{V}]" in str(jaxpr)  # the chunk's logits: 6 tokens


def test_targets_shift_by_depth():
    tokens = np.arange(1, 2 * (T + 1) + 1, dtype=np.int32).reshape(2, T + 1)
    for depth in (0, 1, 2):
        targets, weights = targets_and_weights(tokens, None, depth)
        for i in range(T):
            counts = i + depth + 1 <= T
            assert np.all(weights[:, i] == counts)
            if counts:
                np.testing.assert_array_equal(targets[:, i], tokens[:, i + depth + 1])


def test_segments_exclude_other_documents_and_padding():
    tokens = np.arange(7, dtype=np.int32)[None]
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]], np.int32)
    _, main = targets_and_weights(tokens, segments, 0)
    _, next_one = targets_and_weights(tokens, segments, 1)
    np.testing.assert_array_equal(main, [[1, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(next_one, [[1, 0, 0, 0, 0, 0]])


LAYERS = 3
RNG = np.random.default_rng(5)
STATS = SimpleNamespace(
    counts_E=RNG.random((LAYERS, 4)),
    sequence_loss=RNG.random(LAYERS),
    expert_loss=RNG.random(LAYERS),
    device_loss=RNG.random(LAYERS),
    communication_loss=RNG.random(LAYERS),
    overflow=jnp.zeros(2),
)


def test_balance_loss_by_method():
    weights = dict(
        sequence_weight=0.5, expert_weight=0.3, device_weight=0.2, communication_weight=0.7
    )
    sequence = 0.5 * STATS.sequence_loss.sum()
    auxiliary = (
        sequence
        + 0.3 * STATS.expert_loss.sum()
        + 0.2 * STATS.device_loss.sum()
        + 0.7 * STATS.communication_loss.sum()
    )
    for method, expected in (("none", 0.0), ("loss_free", sequence), ("auxiliary", auxiliary)):
        got = balance_loss(STATS, BalanceConfig(method=method, **weights))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("with_segments", [False, True])
def test_total_is_main_plus_weighted_mtp_plus_balance(with_segments):
    """Two depths: T-k terms with the divisor T, lambda over the number of depths."""
    rng = np.random.default_rng(7)
    hidden = rng.normal(size=(3, B, T, D)).astype(np.float32)
    head = rng.normal(size=(D, V)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T + 1)).astype(np.int32)
    segments = np.sort(rng.integers(0, 3, (B, T + 1)))[:, ::-1].astype(np.int32)
    model = SimpleNamespace(
        hidden_states=lambda tokens, segments_BT: (hidden[0], list(hidden[1:]), STATS),
        head=SimpleNamespace(kernel=head),
        runtime=SimpleNamespace(compute_dtype=jnp.float32, mesh=None),
    )
    batch = {"tokens": tokens} | ({"segments": segments} if with_segments else {})
    losses, counts = model_losses(model, batch, BalanceConfig(sequence_weight=0.5), 0.3)

    sums, terms = [], []
    for depth in range(3):
        logits = hidden[depth].astype(np.float64) @ head
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        picked = [
            -log_p[b, i, tokens[b, i + depth + 1]]
            for b in range(B)
            for i in range(T - depth)
            if not with_segments or segments[b, i] == segments[b, i + depth + 1] != 0
        ]
        sums.append(sum(picked))
        terms.append(len(picked))
    main = sums[0] / terms[0]
    mtp = (sums[1] / terms[0] + sums[2] / terms[0]) / 2
    assert with_segments or terms == [B * T, B * (T - 1), B * (T - 2)]
    balance = 0.5 * STATS.sequence_loss.sum()
    np.testing.assert_allclose(losses.main, main, rtol=1e-5)
    np.testing.assert_allclose(losses.mtp, mtp, rtol=1e-5)
    np.testing.assert_allclose(losses.total, main + 0.3 * mtp + balance, rtol=1e-5)
    np.testing.assert_array_equal(counts, STATS.counts_E)

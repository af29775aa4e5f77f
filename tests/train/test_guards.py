"""Steps that must not reach the weights: which are skipped, and what stays as it was."""

import json
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import RATE, SPEED, WEIGHT, initial

from dsv3_jax import faults
from dsv3_jax.config import GuardConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.train import recheck
from dsv3_jax.train.guards import NO_LIMITS, REHEARSAL, Guard, SpikeWindow, leaf_names
from dsv3_jax.train.losses import model_losses
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step

LEAF = "moe_blocks.norm_f.gain"
POISON = 63  # a token that spoils its row


def golden_steps(count: int):
    """Losses and norms like a run's: a fast fall, then noise, log-normal for the norms."""
    rng = np.random.default_rng(3)
    steps = np.arange(count)
    losses = 2.0 + 8.0 * np.exp(-steps / 300) + 0.05 * rng.standard_normal(count)
    norms = (0.3 + 5 * np.exp(-steps / 100)) * np.exp(0.3 * rng.standard_normal(count))
    return losses, norms


def test_no_golden_step_is_skipped_and_every_spike_is():
    window, false, missed = SpikeWindow(GuardConfig()), 0, 0
    for step, (loss, norm) in enumerate(zip(*golden_steps(10_000), strict=True)):
        limits = window.limits(step)
        false += bool(loss > limits[0]) + bool(norm > limits[1])
        if step > 40:
            missed += bool(10 * loss <= limits[0]) + bool(100 * norm <= limits[1])
        window.add(step, loss, norm)
    assert (false, missed) == (0, 0)


def test_a_continued_run_has_the_limits_of_the_uninterrupted_one():
    losses, norms = golden_steps(300)
    window = SpikeWindow(GuardConfig(window=64))
    for step in range(199):  # as the loop asks: it has not read step 199 when it dispatches 200
        window.add(step, losses[step], norms[step])
    expected = window.limits(200)
    assert np.isfinite(expected).all()
    window.add(199, 100.0, 100.0)  # and a stopped one has
    saved = json.loads(json.dumps(window.state()))
    np.testing.assert_array_equal(SpikeWindow(GuardConfig(window=64), saved).limits(200), expected)
    assert (SpikeWindow(GuardConfig(window=64), saved).limits(201) > expected).all()


@pytest.mark.parametrize(("config", "steps"), [(GuardConfig(), 20), (GuardConfig(sigmas=0.0), 200)])
def test_without_a_window_nothing_is_a_spike(config, steps):
    window = SpikeWindow(config)
    for step in range(steps):
        window.add(step, 1.0, 1.0)
    np.testing.assert_array_equal(window.limits(steps + 1), NO_LIMITS)


def poisoned_losses(model, batch, balance, mtp_weight):
    """The gradient of one leaf is NaN, from one sequence; a whole batch of it spoils the loss."""
    losses, counts_LE = model_losses(model, batch, balance, mtp_weight)
    rows_B = (batch["tokens"] == POISON).any(-1)
    one_leaf = jnp.where(rows_B.sum() == 1, jnp.nan, 0.0) * model.moe_blocks.norm_f.gain[...].sum()
    one_leaf = one_leaf - jax.lax.stop_gradient(one_leaf)
    one_leaf = jnp.where(jnp.isnan(one_leaf), 0.0, one_leaf)  # the value stays finite
    loss = jnp.where(rows_B.all(), jnp.nan, 0.0)
    total, main = losses.total + one_leaf + loss, losses.main + loss
    return losses._replace(total=total, main=main), counts_LE


@pytest.fixture(scope="module")
def guarded(small_config, small_mesh):
    """Config, mesh, first state on the host, and the step on four devices with checksums."""
    config = replace(
        small_config,
        parallel=replace(small_config.parallel, data=2, expert=2),
        guard=GuardConfig(recheck_interval=1),
    )
    mesh = small_mesh(2, 2)
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    start = initial(small_config, small_mesh(1, 1))[1]
    step = make_train_step(config, graphdef, shardings, loss=poisoned_losses)

    def run(tokens, limits=NO_LIMITS, state=None):
        batch = jax.device_put({"tokens": tokens}, batch_sharding(mesh, leading=1))
        state = jax.device_put(start, shardings) if state is None else state
        return step(state, batch, RATE, SPEED, WEIGHT, limits)

    return start, lambda: jax.device_put(start, shardings), run


def tokens_with(rows: int) -> np.ndarray:
    tokens = np.random.default_rng(5).integers(0, POISON, (1, 8, 9)).astype(np.int32)
    tokens[0, :rows, 4] = POISON
    return tokens


@pytest.mark.parametrize(
    ("rows", "limits", "finite"),
    [
        (1, NO_LIMITS, False),
        (8, NO_LIMITS, True),
        (0, np.float32([1e-3, np.inf]), True),
        (0, np.float32([np.inf, 1e-3]), True),
    ],
    ids=["nan in a leaf", "nan in the loss", "loss", "norm"],
)
def test_a_skipped_step_changes_no_bit_and_leaves_a_report(guarded, tmp_path, rows, limits, finite):
    start, _, run = guarded
    tokens = tokens_with(rows)
    state, metrics = jax.device_get(run(tokens, limits))
    assert not metrics["accepted"]
    assert state.step == start.step + 1
    for name in ("params", "router_bias", "opt_state"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(start, name))

    guard = Guard(tmp_path, SpikeWindow(GuardConfig()), leaf_names(start.params))
    said = guard.saw(7, metrics, limits, {"tokens": jnp.asarray(tokens)})
    assert said.startswith("step 7 was skipped: loss ") and "\n" not in said
    assert (f"not finite in {LEAF}" in said) == (rows == 1)
    report = json.loads((tmp_path / "skipped" / "step_7.json").read_text())
    assert np.isfinite(report["gradient_norms"][LEAF]) == finite
    assert np.isfinite(metrics["loss"]) == (rows < 8)
    with np.load(tmp_path / "skipped" / "step_7_process_0.npz") as kept:
        np.testing.assert_array_equal(kept["tokens_0"], tokens)
    guard.saw(8, metrics, limits, {})
    with pytest.raises(UserError, match="3 steps in a row were skipped.*data.seed"):
        guard.saw(9, metrics, limits, {})


def test_an_accepted_step_and_a_rehearsal(guarded):
    """A rehearsal has the step's metrics, bit by bit, and changes nothing."""
    start, fresh, run = guarded
    tokens = tokens_with(0)
    state, rehearsed = run(tokens, REHEARSAL)
    chex.assert_trees_all_equal(jax.device_get(state), start)
    assert not rehearsed["accepted"]
    state, made = run(tokens, state=state)
    assert made["accepted"] and int(state.step) == start.step + 1
    names = leaf_names(start.params)
    assert len(made["leaf_norms"]) == len(names) and LEAF in names
    norm = np.sqrt(np.sum(np.square(made["leaf_norms"])))
    assert norm == pytest.approx(float(made["grad_norm"]), rel=1e-6)
    recheck.compare(0, rehearsed, made, names)


def test_a_bit_flipped_on_one_device_is_noticed(guarded, tmp_path):
    start, fresh, run = guarded
    tokens, names = tokens_with(0), leaf_names(start.params)
    state, rehearsed = run(tokens, REHEARSAL)
    state = replace(state, params=faults.flip_bit(state.params))
    _, made = run(tokens, state=state)
    with pytest.raises(recheck.SilentCorruption, match="computed twice and differs in") as error:
        recheck.compare(3, rehearsed, made, names)
    assert recheck.record(tmp_path, error.value) == recheck.EXIT_CORRUPTION
    assert recheck.record(tmp_path, error.value) == recheck.EXIT_CORRUPTION_AGAIN


def test_checksums_see_every_bit():
    leaf = np.random.default_rng().normal(size=(300, 7)).astype(np.float32)
    flipped = leaf.copy()
    flipped.view(np.uint32)[17, 3] ^= 1
    sums = recheck.leaf_checksums({"a": jnp.asarray(leaf), "b": jnp.asarray(flipped)})
    assert sums[0] == leaf.view(np.uint32).sum(dtype=np.uint32)
    assert sums[0] != sums[1]

"""The train step: accumulation, bias, ZeRO-1, and one device = many devices."""

import functools
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.errors import UserError
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.train.guards import Guard, SpikeWindow, leaf_names
from dsv3_jax.train.losses import model_losses
from dsv3_jax.train.metrics import DispatchedStep, StepLog
from dsv3_jax.train.optim import adamw
from dsv3_jax.train.progress import Reporter
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_eval_step, make_train_step, updated_router_bias

RATE, SPEED, WEIGHT = np.float32(0.01), np.float32(0.125), np.float32(0.3)


@functools.cache
def initial(config, mesh):
    """The static model, the state on the host and its shardings."""
    graphdef, state, shardings = init_state(config, mesh)
    return graphdef, jax.device_get(state), shardings


def run(config, mesh, batches, *, start, speed=SPEED, rate=RATE):
    """State and metrics of each step, from the numbers `start` on a mesh."""
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    state = jax.device_put(start, shardings)
    step = make_train_step(config, graphdef, shardings)
    history = []
    for batch in batches:
        batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
        state, metrics = step(state, batch, rate, speed, WEIGHT)
        history.append(jax.device_get((state, metrics)))
    jax.tree.map(lambda x, sharding: chex.assert_equal(x.sharding, sharding), state, shardings)
    return history


@pytest.fixture(scope="module")
def start(small_config, small_mesh):
    return initial(small_config, small_mesh(1, 1))[1]


@pytest.fixture(scope="module")
def one_device(small_config, small_mesh, small_batch, start):
    batches = [small_batch(seed) for seed in range(3)]
    return run(small_config, small_mesh(1, 1), batches, start=start)


def test_step_is_gradient_clip_adamw_then_bias(small_config, small_mesh, small_batch, one_device):
    """The first step, redone by hand from the model's loss."""
    graphdef, state, _ = initial(small_config, small_mesh(1, 1))
    batch = {"tokens": small_batch(0)["tokens"][0]}

    def total(params):
        model = nnx.merge(graphdef, params, state.router_bias)
        losses, counts = model_losses(model, batch, small_config.balance, WEIGHT)
        return losses.total, (losses, counts)

    (_, (losses, counts)), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state.params)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in jax.tree.leaves(grads)))
    assert norm > 1.0  # the clip acts
    after, metrics = one_device[0]
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], losses.main, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_mtp"], losses.mtp, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_balance"], losses.balance, rtol=1e-6)
    clipped = jax.tree.map(lambda g: g / norm, grads)
    optimizer = adamw(small_config.optim, jnp.float32)
    updates, _ = optimizer.update(clipped, state.opt_state, state.params, learning_rate=RATE)
    expected = jax.tree.map(jnp.add, state.params, updates)
    chex.assert_trees_all_close(after.params, expected, rtol=1e-4, atol=2e-5)
    assert after.step == 1
    # Every layer, MTP included: K tokens a position (MTP's last position has no target), and the
    # bias, 0 before, moved against the load.
    counts = np.asarray(counts)
    np.testing.assert_array_equal(metrics["counts"], counts)
    np.testing.assert_array_equal(counts.sum(-1), [2 * 8 * 8, 2 * 8 * 7])
    want = SPEED * np.sign(counts.mean(-1, keepdims=True) - counts)
    bias = after.router_bias
    np.testing.assert_array_equal(bias["moe_blocks"]["ffn"]["router"]["bias"], want[:1])
    np.testing.assert_array_equal(bias["mtp"]["block"]["ffn"]["router"]["bias"], want[1:])
    excess = (counts.max(-1) - counts.mean(-1)) / counts.mean(-1)
    np.testing.assert_allclose(metrics["max_violation"], excess, rtol=1e-6)


def test_accumulated_microbatches_equal_one_batch(
    small_config, small_mesh, small_batch, start, one_device
):
    """Four micro-batches of 2 rows = one of 8: same loss, gradients and bias."""
    batches = [small_batch(seed, 4) for seed in range(3)]
    four = run(small_config, small_mesh(1, 1), batches, start=start)
    for (state, metrics), (state_4, metrics_4) in zip(one_device, four, strict=True):
        chex.assert_trees_all_equal(state_4.router_bias, state.router_bias)
        np.testing.assert_array_equal(metrics_4["counts"], metrics["counts"])
        for name in ("loss", "loss_mtp", "loss_balance"):
            np.testing.assert_allclose(metrics_4[name], metrics[name], rtol=2e-6)
        np.testing.assert_allclose(metrics_4["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    assert_same_gradients(four[0][0], one_device[0][0])


def test_a_step_whose_rows_found_no_room_did_not_happen(
    small_config, small_mesh, small_batch, start, tmp_path
):
    """8 tokens a device and room for an even share alone: routing at random weights needs more."""
    parallel = replace(small_config.parallel, expert=8, buffer_factor=1.0)
    config, mesh = replace(small_config, parallel=parallel), small_mesh(1, 8)
    ((state, metrics),) = run(config, mesh, [small_batch(0)], start=start)
    assert metrics["overflow"] > 0
    chex.assert_trees_all_equal(state, start)
    guard = Guard(tmp_path, SpikeWindow(config.guard), leaf_names(start.params))
    log = StepLog(tmp_path, 0, Reporter(config, jax.devices()[:8]), guard)
    log.dispatched(
        DispatchedStep(
            step=0,
            tokens=0,
            step_tokens=64,
            learning_rate=0.01,
            data_seconds=0.0,
            metrics=metrics,
            batch={},
            validation_loss=None,
        )
    )
    with pytest.raises(UserError, match=r"step 0: .* raise parallel.buffer_factor"):
        log.flush()
    assert not (tmp_path / "metrics.jsonl").read_text()


def assert_same_gradients(state, expected):
    """Compares the first moments after one step: the clipped gradients, times 1 - beta1."""
    got = dict(jax.tree_util.tree_leaves_with_path(state.opt_state.mean))
    for path, want in jax.tree_util.tree_leaves_with_path(expected.opt_state.mean):
        assert np.linalg.norm(want) > 0, path
        error = np.linalg.norm(got[path] - want) / np.linalg.norm(want)
        assert error <= 1e-5, (path, error)


def test_bias_stays_without_the_loss_free_method(small_config, small_mesh, small_batch, start):
    auxiliary = replace(small_config, balance=replace(small_config.balance, method="auxiliary"))
    ((state, metrics),) = run(auxiliary, small_mesh(1, 1), [small_batch(0)], start=start)
    assert all(np.all(bias == 0.0) for bias in jax.tree.leaves(state.router_bias))
    assert metrics["loss_balance"] > 0


def test_bias_of_each_layer_moves_by_its_own_counts():
    """Two main layers and two depths of MTP, in the order of the stacked counts."""
    bias = {"mtp": {"b": jnp.zeros((2, 3))}, "moe_blocks": {"b": jnp.zeros((2, 3))}}
    counts = jnp.asarray([[1, 2, 3], [3, 2, 1], [4, 1, 1], [2, 2, 2]], jnp.float32)
    got = updated_router_bias(bias, counts, 0.5)
    np.testing.assert_array_equal(got["moe_blocks"]["b"], [[0.5, 0, -0.5], [-0.5, 0, 0.5]])
    np.testing.assert_array_equal(got["mtp"]["b"], [[-0.5, 0.5, 0.5], [0, 0, 0]])
    chex.assert_trees_all_equal(updated_router_bias(bias, counts, 0.0), bias)


def test_evaluation_is_the_main_loss_and_changes_nothing(
    small_config, small_mesh, small_batch, one_device
):
    graphdef, state, _ = initial(small_config, small_mesh(1, 1))
    params, bias = jax.device_put((state.params, state.router_bias))
    loss = make_eval_step(graphdef)(params, bias, {"tokens": small_batch(0)["tokens"][0]})
    np.testing.assert_allclose(loss, one_device[0][1]["loss"], rtol=1e-6)
    chex.assert_trees_all_equal((params, bias), (state.params, state.router_bias))


def test_zero1_shards_the_moments_and_replicates_dense_weights(small_config, small_mesh):
    """Each of 8 devices holds 1/8 of every moment whose dims allow it, 1/4 of the experts' weights,
    and all of the other weights; moments are bfloat16, masters float32."""
    precision = replace(small_config.precision, moments="bfloat16")
    _, state, _ = init_state(replace(small_config, precision=precision), small_mesh(2, 4))

    def local_bytes(x):
        assert len(x.addressable_shards) == 8
        return max(shard.data.nbytes for shard in x.addressable_shards)

    params = dict(jax.tree_util.tree_leaves_with_path(state.params))
    divided = 0
    for moments in (state.opt_state.mean, state.opt_state.variance):
        for path, moment in jax.tree_util.tree_leaves_with_path(moments):
            param = params[path]
            experts = 4 if "experts" in jax.tree_util.keystr(path) else 1
            assert local_bytes(param) == 4 * param.size // experts, path
            if any(dim % 8 == 0 for dim in param.shape):
                assert local_bytes(moment) == 2 * moment.size // 8, path
                divided += moment.size
    assert divided > 0.99 * 2 * sum(param.size for param in params.values())
    assert all(local_bytes(bias) == 4 * bias.size for bias in jax.tree.leaves(state.router_bias))


def test_fsdp_shards_the_weights_too(small_config, small_mesh):
    config = replace(small_config, parallel=replace(small_config.parallel, layout="fsdp_ep"))
    _, abstract = abstract_state(config, small_mesh(2, 4))
    embed = abstract.params["embed"]["table"]
    assert embed.sharding.shard_shape(embed.shape) == (64, 16 // 8)


def test_initial_numbers_do_not_depend_on_the_mesh(small_config, small_mesh, start):
    config = replace(small_config, parallel=replace(small_config.parallel, layout="fsdp_ep"))
    chex.assert_trees_all_equal(initial(config, small_mesh(2, 4))[1], start)
    matrices = [np.ravel(x) for x in jax.tree.leaves(start.params) if x.std() > 0]
    assert abs(np.std(np.concatenate(matrices)) / config.model.init_std - 1) < 0.05
    gains = [x for x in jax.tree.leaves(start.params) if x.std() == 0]
    assert gains and all(np.all(gain == 1) for gain in gains)


EIGHT = [
    (2, 4, "zero1_ep", "padded"),
    (4, 2, "fsdp_ep", "padded"),
    (2, 4, "zero1_ep", "hierarchical"),
    (2, 4, "zero1_ep", "ragged"),
]


@pytest.mark.parametrize(
    ("data", "expert", "layout", "dispatch"),
    EIGHT[:2] + [pytest.param(*case, marks=pytest.mark.slow) for case in EIGHT[2:]],
)
def test_eight_devices_equal_one(
    small_config, small_mesh, small_batch, start, one_device, data, expert, layout, dispatch
):
    """Loss and every gradient leaf to 1e-5, the router bias after 3 steps exactly."""
    parallel = replace(
        small_config.parallel,
        data=data, expert=expert, layout=layout, dispatch=dispatch, devices_per_node=2,
    )  # fmt: skip
    config, mesh = replace(small_config, parallel=parallel), small_mesh(data, expert)
    eight = run(config, mesh, [small_batch(seed) for seed in range(3)], start=start)
    for name in ("loss", "loss_mtp", "loss_balance", "grad_norm"):
        np.testing.assert_allclose(eight[0][1][name], one_device[0][1][name], rtol=1e-5)
    assert_same_gradients(eight[0][0], one_device[0][0])
    for (state, metrics), (state_8, metrics_8) in zip(one_device, eight, strict=True):
        np.testing.assert_array_equal(metrics_8["counts"], metrics["counts"])
        chex.assert_trees_all_equal(state_8.router_bias, state.router_bias)

"""The train step through a pipeline: what the scan executor gives, for every schedule and mesh."""

import functools
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from small_model import SMALL_MODEL
from test_step import SPEED, WEIGHT, assert_same_gradients, initial, run

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import make_train_step

# V3's peak (spec §8). AdamW turns the last bits of a gradient near zero into a step of this size.
RATE = np.float32(2.2e-4)
MICROBATCHES, ROWS = 8, 4  # as many as `dualpipe` wants on four ranks; a row a device
SIX_LAYERS = replace(SMALL_MODEL, num_layers=7)  # after the dense one: unequal stages on 4 ranks
MESHES = ((4, 1, 2), (2, 2, 2))
# Every schedule, both meshes and every remat policy, in four programs; the default tests take one,
# since `tests/pipeline/test_executor.py` runs every schedule.
SPREAD = [
    ("dualpipe", (2, 2, 2), "none"),
    ("dualpipev", (4, 1, 2), "paper"),
    ("zb1p", (4, 1, 2), "full"),
    ("1f1b", (2, 2, 2), "paper"),
]
THE_REST = [
    (schedule, mesh, policy)
    for schedule in ("dualpipe", "dualpipev", "zb1p", "1f1b")
    for mesh in MESHES
    for policy in ("none", "paper", "full")
    if (schedule, mesh, policy) not in SPREAD
]


def make_batch(seed: int, microbatches: int = MICROBATCHES, rows: int = ROWS):
    tokens = np.random.default_rng(seed).integers(
        0, SMALL_MODEL.vocab_size, (microbatches, rows, 9)
    )
    return {"tokens": tokens.astype(np.int32)}


def make_config(base, mesh=(1, 1, 1), model=SIX_LAYERS, compute="float32", remat="none", **rest):
    pipe, data, expert = mesh
    return replace(
        base,
        model=model,
        parallel=replace(base.parallel, pipe=pipe, data=data, expert=expert, **rest),
        precision=replace(base.precision, compute=compute, remat=remat),
    )


def steps(config, batches, start):
    return run(config, make_mesh(config.parallel), batches, start=start, rate=RATE)


def start_of(config):
    """The first state on the host, the same for all meshes."""
    alone = replace(config, parallel=replace(config.parallel, pipe=1, data=1, expert=1))
    return initial(alone, make_mesh(alone.parallel))[1]


def assert_same_step(got, want, *, losses=("loss", "loss_mtp", "loss_balance")):
    """Losses, counts, the gradients' norm and every leaf, of the first of some steps."""
    (state, metrics), (expected, expected_metrics) = got[0], want[0]
    for name in (*losses, "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    np.testing.assert_array_equal(metrics["counts"], expected_metrics["counts"])
    assert_same_gradients(state, expected)


@pytest.fixture(scope="module")
def five_steps(small_config):
    """Batches, the first state, and the scan executor's steps on one device."""
    config = make_config(small_config)
    # Two float32 orders of summing differ by 2e-6 to 5e-6 in the worst leaf, and by up to 3e-5 for
    # batches (such as 0, 2, 9) whose gradient of a gain nearly cancels.
    batches, start = [make_batch(seed) for seed in (8, 6, 4, 1, 7)], start_of(config)
    return batches, start, steps(config, batches, start)


@pytest.mark.parametrize(
    ("schedule", "mesh", "policy"),
    SPREAD[:1] + [pytest.param(*case, marks=pytest.mark.slow) for case in SPREAD[1:] + THE_REST],
)
def test_every_schedule_gives_the_scan_executors_step(
    small_config, five_steps, schedule, mesh, policy
):
    """Losses and every gradient leaf; after 5 steps the weights, and the router biases exactly."""
    batches, start, expected = five_steps
    config = make_config(small_config, mesh, remat=policy, schedule=schedule)
    got = steps(config, batches, start)
    assert_same_step(got, expected)
    for (state, metrics), (want, want_metrics) in zip(got, expected, strict=True):
        np.testing.assert_array_equal(metrics["counts"], want_metrics["counts"])
        chex.assert_trees_all_equal(state.router_bias, want.router_bias)
    params = dict(jax.tree_util.tree_leaves_with_path(got[-1][0].params))
    for path, want in jax.tree_util.tree_leaves_with_path(expected[-1][0].params):
        error = np.linalg.norm(params[path] - want) / np.linalg.norm(want)
        assert error <= 1e-5, (path, error)
        assert not np.array_equal(want, start_leaf(start, path)), path


def start_leaf(start, path):
    return functools.reduce(lambda tree, key: tree[key.key], path, start.params)


def test_state_is_split_over_pipe_data_and_expert(small_config):
    """A device of 8 holds 1/8 of the moments and of the experts' masters, half of the others'."""
    config = make_config(small_config, (2, 2, 2))
    _, state = abstract_state(config, make_mesh(config.parallel))

    def own_share(leaves):
        held = sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in leaves)
        return held / sum(leaf.size for _, leaf in leaves)

    moments = jax.tree_util.tree_leaves_with_path(state.opt_state)
    masters = jax.tree_util.tree_leaves_with_path(state.params)
    experts = [leaf for leaf in masters if "experts" in jax.tree_util.keystr(leaf[0])]
    others = [leaf for leaf in masters if "experts" not in jax.tree_util.keystr(leaf[0])]
    assert own_share(moments) == pytest.approx(1 / 8, rel=0.02)
    assert own_share(experts) == 1 / 4
    assert own_share(others) == pytest.approx(1 / 2, rel=0.01)


@pytest.mark.parametrize(("saved", "restored"), [((2, 2, 2), (1, 1, 2)), ((1, 2, 2), (4, 1, 2))])
def test_checkpoints_know_no_stages(small_config, five_steps, tmp_path, saved, restored):
    """What one mesh saved the other restores, with and without a pipeline, to the bit."""
    _, start, expected = five_steps
    state = expected[-1][0]

    def template(mesh):
        config = make_config(small_config, mesh)
        return abstract_state(config, make_mesh(config.parallel))[1]

    manager = CheckpointManager(tmp_path, keep=1)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template(saved))
    manager.save(5, vars(jax.device_put(state, shardings)), {}, wait=True)
    found, _, step = manager.restore(vars(template(restored)))
    manager.close()
    assert step == 5
    chex.assert_trees_all_equal(jax.device_get(found), vars(state))
    jax.tree.map(
        lambda leaf, want: chex.assert_equal(leaf.sharding, want.sharding),
        found, vars(template(restored)),
    )  # fmt: skip


def compare_with_scan(config, mesh, batch, *, scan_mesh=(1, 1, 1)):
    """A step through the pipeline, and one without, from the same state."""
    start = start_of(config)

    def on(pipe, data, expert):
        parallel = replace(config.parallel, pipe=pipe, data=data, expert=expert)
        return steps(replace(config, parallel=parallel), [batch], start)

    return on(*mesh), on(*scan_mesh)


def with_segments(batch):
    """Two documents a row, parted at another place in each."""
    tokens = batch["tokens"]
    parts = np.random.default_rng(1).integers(2, 8, (*tokens.shape[:2], 1))
    return batch | {"segments": (np.arange(tokens.shape[-1]) >= parts).astype(np.int32)}


@pytest.mark.slow
def test_parts_of_the_model_that_other_models_have(small_config):
    """No dense layer, two MTP modules on the state before the norm, documents kept apart, and
    weights split by FSDP with dispatch between nodes."""
    model = replace(
        SIX_LAYERS, num_layers=3, num_dense_layers=0, mtp_depth=2, mtp_hidden="pre_norm"
    )
    rest = dict(layout="fsdp_ep", dispatch="hierarchical", devices_per_node=1)
    config = make_config(small_config, model=model, **rest)
    got, want = compare_with_scan(config, (2, 2, 2), with_segments(make_batch(0, 4)))
    assert_same_step(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev"])
def test_a_model_without_mtp(small_config, schedule):
    model = replace(SIX_LAYERS, mtp_depth=0)
    config = make_config(small_config, model=model, schedule=schedule)
    got, want = compare_with_scan(config, (2, 1, 2), make_batch(0, 4))
    assert_same_step(got, want, losses=("loss", "loss_balance"))


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp8", "bfloat16"])
def test_low_precision_rounds_where_the_scan_executor_does(small_config, compute):
    """To float32 sums, on the same data x expert mesh: FP8 scales tiles of a device's own tokens.

    The compiler must round to bfloat16 where the program says so: by default it leaves some of
    these out, others in each program, and FP8 gradients then differ by as much as one step of FP8.
    """
    model = replace(SIX_LAYERS, num_layers=2, num_dense_layers=0, mtp_depth=0)
    config = make_config(small_config, model=model, compute=compute, schedule="1f1b")
    batch, start = make_batch(0, 2), start_of(config)

    def step_on(pipe, data, expert):
        own = make_config(config, (pipe, data, expert), model, compute)
        mesh = make_mesh(own.parallel)
        graphdef, template = abstract_state(own, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
        state = jax.device_put(start, shardings)
        args = (state, jax.device_put(batch, batch_sharding(mesh, leading=1)), RATE, SPEED, WEIGHT)
        step = make_train_step(own, graphdef, shardings).lower(*args)
        compiled = step.compile(compiler_options={"xla_allow_excess_precision": False})
        return [jax.device_get(compiled(*args))]

    got, want = step_on(2, 2, 2), step_on(1, 2, 2)
    assert_same_step(got, want, losses=("loss", "loss_balance"))

"""The executor on a model of three lines: every schedule's gradients, and wrong tables seen.

The whole model goes through it in `tests/train/test_pipeline_step.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.parallel.pipeline.executor import Model, Weights, run_table
from dsv3_jax.parallel.pipeline.schedules import SCHEDULES, make_schedule
from dsv3_jax.parallel.pipeline.stages import AXIS, Stages
from dsv3_jax.parallel.pipeline.tables import build_table

MICROBATCHES, SHAPE, WIDTH = 8, (2, 3, 4), 4
LAYER_LOSS_WEIGHT = 0.5
# Layers of each stage: unequal, and none where an end has enough to do itself.
LAYERS = {2: (2, 1), 4: (0, 2, 1, 3), 8: (1, 2, 1, 1, 2, 1, 1, 0)}


def entry(params, constants, _):
    return constants["input"] @ params["first"], ()


def layer(params, constants, x):
    scale, bias = constants  # of the micro-batch, and of the layer
    y = x + scale * jnp.tanh(x @ params + bias)
    return (y, jnp.mean(jnp.sin(y))), jnp.sum(x > 0, axis=(0, 1))


def exit_(params, constants, x):
    loss = jnp.mean((x @ params["last"] - constants["target"]) ** 2)
    return loss, loss


@functools.cache
def numbers(num_layers: int):
    """Weights, and what the micro-batches and layers bring."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = Weights(
        layers=0.5 * normal(num_layers, WIDTH, WIDTH),
        entry={"first": normal(WIDTH, WIDTH)},
        exit={"last": normal(WIDTH, WIDTH)},
    )
    constants = {
        "scale": jnp.linspace(0.5, 1.5, MICROBATCHES),
        "bias": normal(num_layers, WIDTH),
        "input": normal(MICROBATCHES, *SHAPE),
        "target": normal(MICROBATCHES, *SHAPE),
    }
    return weights, constants


@functools.cache
def expected(num_layers: int):
    """Sums over the micro-batches, by `jax.grad`: gradients, losses, statistics."""
    weights, constants = numbers(num_layers)

    def total(weights):
        result, layer_loss, exit_loss, statistics = 0, 0, 0, []
        for m in range(MICROBATCHES):
            ends = {name: constants[name][m] for name in ("input", "target")}
            x, _ = entry(weights["entry"], ends, ())
            seen = []
            for i in range(num_layers):
                own = (constants["scale"][m], constants["bias"][i])
                (x, loss), counts = layer(weights["layers"][i], own, x)
                layer_loss += loss
                seen.append(counts)
            exit_loss += exit_(weights["exit"], ends, x)[0]
            statistics.append(jnp.stack(seen))
        result = exit_loss + LAYER_LOSS_WEIGHT * layer_loss
        return result, (layer_loss, exit_loss, sum(statistics))

    grads, (layer_loss, exit_loss, statistics) = jax.jit(jax.grad(total, has_aux=True))(
        vars(weights)
    )
    return jax.device_get((grads, layer_loss, exit_loss, statistics))


def make_program(table, moe_layers):
    """A compiled function of the table's columns, which may thus be changed."""
    stages = Stages.build(moe_layers, table.stage_of)
    weights, constants = numbers(sum(moe_layers))
    # Whether anything turns round on its own rank is asked while compiling.
    own = {name: column for name, column in table.columns.items() if name.endswith("_own")}

    def shard(columns, weights, constants):
        bias = stages.to_stages(constants["bias"], None)
        model = Model(
            entry=entry,
            layer=layer,
            exit=exit_,
            constants=lambda m: constants["scale"][m],
            layer_constants=lambda slot, i: bias[slot, i],
            end_constants=lambda m: {name: constants[name][m] for name in ("input", "target")},
            loss_weight=LAYER_LOSS_WEIGHT,
        )
        staged = Weights(
            layers=stages.to_stages(weights["layers"], None),
            entry=weights["entry"],
            exit=weights["exit"],
        )
        changed = dataclasses.replace(table, columns=columns | own)
        x_like = jax.ShapeDtypeStruct(SHAPE, jnp.float32)
        sums = run_table(changed, stages.num_layers, model, staged, x_like)
        ends, *losses = jax.lax.psum((sums.ends, sums.layer_loss, sums.exit_loss), AXIS)
        grads = {
            "layers": stages.to_layers(sums.layers, None),
            "entry": {"first": ends["first"]},
            "exit": {"last": ends["last"]},
        }
        return grads, *losses, stages.to_layers(sums.layer_statistics, None)

    mesh = Mesh(np.array(jax.devices()[: table.ranks]), (AXIS,))
    program = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    return lambda columns: jax.device_get(
        program(
            {name: column for name, column in columns.items() if name not in own},
            vars(weights),
            constants,
        )
    )


def gradient_error(got, want) -> float:
    """The largest relative error of a leaf."""
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), got, want)
    return max(jax.tree.leaves(errors))


def assert_right(got, want):
    grads, layer_loss, exit_loss, statistics = got
    assert gradient_error(grads, want[0]) < 3e-6
    np.testing.assert_allclose([layer_loss, exit_loss], want[1:3], rtol=3e-6)
    np.testing.assert_array_equal(statistics, want[3])


CASES = [(name, ranks, None) for name in SCHEDULES for ranks in (2, 4)]
CASES += [("dualpipe", 4, 0), ("dualpipe", 4, 1), ("zb1p", 4, 2)]


@pytest.mark.parametrize(("name", "ranks", "max_deferred"), CASES)
def test_gradients_are_those_of_the_whole_model(name, ranks, max_deferred):
    schedule = make_schedule(name, ranks, MICROBATCHES)
    table = build_table(schedule, max_deferred=max_deferred)
    layers = LAYERS[schedule.num_stages]
    assert_right(make_program(table, layers)(table.columns), expected(sum(layers)))


@pytest.fixture(scope="module")
def dualpipe():
    table = build_table(make_schedule("dualpipe", 4, MICROBATCHES))
    return table, make_program(table, LAYERS[4])


def one_wrong_entry(table, column: str):
    """The columns with another slot or micro-batch in the middle of what rank 1 does."""
    entries = table.columns[column].copy()
    sizes = {"a": table.num_activation_slots, "g": table.num_gradient_slots}
    used = np.flatnonzero((entries[:, 1] >= 0) & (entries[:, 1] < sizes.get(column[0], 99)))
    tick = used[len(used) // 2]
    entries[tick, 1] = {0: 1, 1: 0}.get(entries[tick, 1], 0)
    return table.columns | {column: entries}


@pytest.mark.parametrize(
    ("column", "loss_is_right"),
    [("a_left", False), ("f_input", False), ("f_microbatch", False), ("f_slot", False)]
    + [(f"g_{side}", True) for side in ("left", "right")]
    + [(f"b_{what}", True) for what in ("slot", "microbatch", "input", "residual")]
    + [("w_slot", True), ("w_residual", True), ("w_weights", True)],
)
def test_one_wrong_entry_spoils_the_gradients(dualpipe, column, loss_is_right):
    """All shapes are right, and with a wrong backward so is the loss: it alone proves nothing."""
    table, program = dualpipe
    want = expected(sum(LAYERS[4]))
    grads, *losses, _ = program(one_wrong_entry(table, column))
    assert gradient_error(grads, want[0]) > 0.01
    assert np.allclose(losses, want[1:3], rtol=1e-5) == loss_is_right

"""The average in host memory equals the plain recursion and survives save and restore."""

import time

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.train.ema import HostEma, ema_template

DECAY = 0.9


def params_on(data: int, expert: int, host: dict) -> dict:
    devices = np.array(jax.devices()[: data * expert]).reshape(1, data, expert)
    mesh = Mesh(devices, ("pipe", "data", "expert"))
    specs = {
        "experts": PartitionSpec("expert", "data"),
        "table": PartitionSpec(),
        "scale": PartitionSpec(),
    }
    return {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in host.items()}


@pytest.fixture(scope="module")
def host():
    rng = np.random.default_rng(0)
    shapes = {"experts": (8, 16, 12), "table": (48, 20), "scale": ()}
    return {k: np.asarray(rng.normal(size=s), np.float32) for k, s in shapes.items()}


@pytest.fixture(scope="module")
def step():
    """Moves every weight and reuses its buffer, as a training step does."""
    return jax.jit(lambda p: jax.tree.map(lambda x: x * 1.03 - 0.2, p), donate_argnums=0)


def recursion(trajectory):
    """The definition, in float64."""
    average = {k: x.astype(np.float64) for k, x in trajectory[0].items()}
    for params in trajectory[1:]:
        average = {k: DECAY * average[k] + (1 - DECAY) * params[k] for k in average}
    return average


def test_equals_the_recursion_and_runs_beside_donating_steps(host, step):
    params = params_on(2, 4, host)
    ema = HostEma(params, DECAY)
    trajectory = [host]
    for _ in range(15):
        params = step(params)
        trajectory.append(jax.tree.map(np.array, params))
    params = params_on(2, 4, host)
    for _ in range(15):
        params = step(params)
        ema.update(params)
    value = ema.value()
    chex.assert_trees_all_close(value, recursion(trajectory), rtol=2e-6, atol=2e-6)
    assert np.abs(value["table"] - trajectory[-1]["table"]).max() > 0.1
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in value.values())


def test_value_is_a_copy_and_memory_holds_each_distinct_shard_once(host, step):
    params = params_on(2, 4, host)
    ema = HostEma(params, DECAY)
    before = ema.value()
    kept = jax.tree.map(np.copy, before)
    ema.update(step(params))
    after = ema.value()
    chex.assert_trees_all_equal(before, kept)
    assert not np.array_equal(after["table"], kept["table"])
    held = sum(x.nbytes for shards in ema._shards for x in shards.values())
    assert held == sum(x.nbytes for x in host.values())


def test_resume_is_exact_on_the_same_and_on_another_mesh(host, step, tmp_path):
    params = params_on(2, 4, host)
    ema = HostEma(params, DECAY)
    manager = CheckpointManager(tmp_path, keep=1)
    for i in range(6):
        params = step(params)
        ema.update(params)
        if i == 2:
            manager.save(3, {"params": params, "ema": ema.value()}, {})
    expected = ema.value()
    for shape in [(2, 4), (1, 8), (1, 1)]:
        start = params_on(*shape, host)
        resumed = HostEma(start, DECAY)
        template = {
            "params": jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), start
            ),
            "ema": ema_template(start),
        }
        state, _, _ = manager.restore(template)
        resumed.restore(state["ema"])
        params = state["params"]
        for _ in range(3):
            params = step(params)
            resumed.update(params)
        chex.assert_trees_all_equal(resumed.value(), expected)
    manager.close()


def test_update_does_not_wait_for_the_arithmetic(host, monkeypatch):
    params = params_on(2, 4, host)
    ema = HostEma(params, DECAY)
    apply = ema._apply
    monkeypatch.setattr(ema, "_apply", lambda copies: (time.sleep(0.3), apply(copies)))
    start = time.perf_counter()
    ema.update(params)
    assert time.perf_counter() - start < 0.25
    ema.value()
    assert time.perf_counter() - start > 0.29


def test_an_error_in_the_background_reaches_the_caller(host, monkeypatch):
    params = params_on(1, 1, host)
    ema = HostEma(params, DECAY)
    monkeypatch.setattr(ema, "_apply", lambda copies: 1 / 0)
    ema.update(params)
    with pytest.raises(ZeroDivisionError):
        ema.value()

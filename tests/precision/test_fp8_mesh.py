"""The train step in FP8 on a mesh of 8 devices: where codes lie, and the same numbers as on one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import MODEL, RATE, make_batch, make_config, make_mesh, run

from dsv3_jax.precision.fp8_weight import Fp8Weight, quantize_weights
from dsv3_jax.precision.policy import PUBLISHED
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_eval_step

WITHOUT_MTP = replace(MODEL, mtp_depth=0)


@pytest.fixture(scope="module")
def start():
    """The same first state for all, on the host."""
    return jax.device_get(init_state(make_config(model=WITHOUT_MTP), make_mesh())[1])


@pytest.fixture(scope="module")
def one_device(start):
    """A batch, and the state and metrics after a step: 128 tokens for each of 8 devices."""
    batch = make_batch(32)
    return batch, *run(make_config(model=WITHOUT_MTP), start, [batch])[0]


def test_evaluation_quantises_to_the_same_numbers(start, one_device):
    batch, _, metrics = one_device
    graphdef, _ = abstract_state(make_config(model=WITHOUT_MTP), make_mesh())
    evaluate = make_eval_step(graphdef)
    loss = evaluate(start.params, start.router_bias, {"tokens": batch["tokens"][0]})
    np.testing.assert_allclose(metrics["loss"], loss, rtol=5e-6)


def test_codes_lie_where_their_masters_do():
    config = make_config(layout="fsdp_ep", data=2, expert=4)
    _, template = abstract_state(config, make_mesh(2, 4))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template.params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), template.params)
    params = jax.device_put(zeros, shardings)
    quantized = jax.jit(lambda params: quantize_weights(params, PUBLISHED, shardings))(params)

    def check(weight, master):
        if isinstance(weight, Fp8Weight):
            own, swapped = (codes.sharding for codes in (weight.codes_IO, weight.codes_OI))
            assert own.is_equivalent_to(master.sharding, master.ndim)
            shard = own.shard_shape(master.shape)
            assert swapped.shard_shape(weight.codes_OI.shape) == (*shard[:-2], *shard[:-3:-1])
            return master.sharding.is_fully_replicated
        return True

    replicated = jax.tree.map(check, quantized, params, is_leaf=lambda w: isinstance(w, Fp8Weight))
    assert not all(jax.tree.leaves(replicated))


@pytest.mark.parametrize("layout", ["zero1_ep", pytest.param("fsdp_ep", marks=pytest.mark.slow)])
def test_eight_devices_equal_one(layout, start, one_device):
    batch, one, one_metrics = one_device
    config = make_config(layout=layout, data=2, expert=4, model=WITHOUT_MTP)
    ((many, metrics),) = run(config, start, [batch])
    np.testing.assert_allclose(metrics["loss"], one_metrics["loss"], rtol=1e-3)
    np.testing.assert_allclose(metrics["grad_norm"], one_metrics["grad_norm"], rtol=1e-2)
    # AdamW's first step moves every weight by the rate, in the direction of its gradient.
    same = jax.tree.map(lambda a, b: np.abs(a - b) < 0.1 * RATE, many.params, one.params)
    assert np.mean(np.concatenate([s.ravel() for s in jax.tree.leaves(same)])) > 0.97

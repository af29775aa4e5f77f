"""Stages: a balanced division of the layers, and the exchange of weights and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax import configs
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.pipeline.partition import moe_layers_of_stages
from dsv3_jax.parallel.pipeline.schedules import SCHEDULES, make_schedule
from dsv3_jax.parallel.pipeline.stages import AXIS, Stages

V3 = configs.get("deepseek_v3_671b").model
MOE_LAYERS = (1, 3, 2, 0, 1, 2, 1, 2)  # of as many as 8 stages


def test_the_ends_have_fewer_layers_for_what_else_they_do():
    """58 MoE layers on 16 stages: the last has the head and the MTP module, the first the three
    dense layers; the others differ by one at most."""
    counts = moe_layers_of_stages(V3, 16)
    assert len(counts) == 16 and sum(counts) == V3.num_moe_layers == 58
    inner = counts[1:-1]
    assert counts[0] <= min(inner) and counts[-1] < min(inner)
    assert max(inner) - min(inner) <= 1


def test_without_ends_of_their_own_stages_differ_by_one_at_most():
    small = configs.get("tiny").model
    model = replace(small, num_layers=64, num_dense_layers=0, mtp_depth=0, vocab_size=2)
    assert set(moe_layers_of_stages(model, 8)) <= {7, 8, 9}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 5, 8])
def test_as_few_layers_as_the_error_names_are_enough(num_stages):
    """One layer less is refused, and the ends may then have none."""
    tiny = configs.get("tiny").model
    with pytest.raises(UserError, match="model.num_layers=1 leaves 0 MoE layers") as error:
        moe_layers_of_stages(replace(tiny, num_layers=1), num_stages)
    text = str(error.value)
    assert "\n" not in text and "parallel.pipe or parallel.schedule" in text
    least = int(text.partition("at least ")[2].split()[0])
    counts = moe_layers_of_stages(replace(tiny, num_layers=least), num_stages)
    assert sum(counts) == least - tiny.num_dense_layers
    assert min(counts[1:-1], default=1) >= 1
    if least > 2:
        with pytest.raises(UserError, match=f"at least {least} layers"):
            moe_layers_of_stages(replace(tiny, num_layers=least - 1), num_stages)


def stages_of(name: str, ranks: int) -> Stages:
    schedule = make_schedule(name, ranks, 2 * ranks)
    return Stages.build(MOE_LAYERS[: schedule.num_stages], schedule.stage_of)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_layer_has_its_ranks_in_order(name):
    stages = stages_of(name, 4)
    copies = 2 if name == "dualpipe" else 1
    held = stages.layer_of[stages.layer_of >= 0]
    assert sorted(held) == sorted(list(range(max(held) + 1)) * copies)
    for stage in stages.layer_of.reshape(-1, stages.layer_of.shape[-1]):
        own = stage[stage >= 0]
        np.testing.assert_array_equal(np.diff(own), 1)  # one after the other, first of all
        np.testing.assert_array_equal(stage[: len(own)], own)
    np.testing.assert_array_equal(stages.num_layers, (stages.layer_of >= 0).sum(-1))


@pytest.mark.parametrize("split_dim", [None, 1, 2])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "1f1b"])
def test_weights_reach_their_ranks_whole_and_gradients_return_summed(name, split_dim):
    stages = stages_of(name, 4)
    num_layers = int(stages.layer_of.max()) + 1
    weight = np.random.default_rng(0).normal(size=(num_layers, 4, 8)).astype(np.float32)
    spec = P(*(AXIS if dim == split_dim else None for dim in range(3)))

    def shard(own_part):
        staged = stages.to_stages(own_part, split_dim)
        # A gradient that tells the ranks apart: what they hold, times 1, 10, 100, 1000.
        gradient = staged * 10.0 ** jax.lax.axis_index(AXIS)
        return staged[None], stages.to_layers(gradient, split_dim)

    mesh = Mesh(np.array(jax.devices()[:4]), (AXIS,))
    staged, gradient = jax.jit(
        jax.shard_map(
            shard, mesh=mesh, in_specs=spec, out_specs=(P(AXIS), spec), check_vma=False
        )
    )(jnp.asarray(weight))  # fmt: skip
    factor = np.zeros(num_layers)
    for place in np.ndindex(stages.layer_of.shape):
        layer = stages.layer_of[place]
        if layer >= 0:
            np.testing.assert_array_equal(staged[place], weight[layer])
            factor[layer] += 10.0 ** place[0]
    np.testing.assert_allclose(gradient, weight * factor[:, None, None], rtol=1e-6)

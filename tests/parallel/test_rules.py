"""Layouts: every weight of the model has a place in both, and mistakes raise."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import AXES, batch_sharding, make_mesh
from dsv3_jax.parallel.rules import (
    LAYOUTS,
    logical_to_spec,
    optimizer_sharding,
    weight_sharding,
)

MESH = AbstractMesh((1, 2, 4), AXES)


@pytest.fixture(scope="module")
def weights():
    """{path: (shape, logical axes)} of `tiny`, with a query latent and an MTP module."""
    model = nnx.eval_shape(lambda: DeepSeekV3(tiny().model, runtime=Runtime(), rngs=nnx.Rngs(0)))
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): (p.shape, p.get_metadata()["axes"]) for path, p in params}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_weight_of_the_model_has_a_place(weights, layout):
    assert len(weights) > 30
    for name, (shape, axes) in weights.items():
        assert axes[-1] != "layer" and len(axes) in (len(shape), len(shape) - 1), name
        sharding = weight_sharding(MESH, shape, axes, layout)
        assert np.prod(sharding.shard_shape(shape)) <= np.prod(shape)


def test_zero1_ep_splits_the_experts_alone(weights):
    split = {
        name: weight_sharding(MESH, shape, axes, "zero1_ep").spec
        for name, (shape, axes) in weights.items()
    }
    split = {name: spec for name, spec in split.items() if any(spec)}
    experts = {f"{b}.ffn.experts.{w}" for b in ("moe_blocks", "mtp.block") for w in ("w13", "w2")}
    assert split == dict.fromkeys(experts, P(None, "expert", None, None))


def test_fsdp_ep_splits_the_width_of_every_matrix(weights):
    both = ("data", "expert")
    expected = {
        "embed.table": P(None, both),
        "dense_blocks.attn.wq_a.kernel": P(None, both, None),
        "moe_blocks.attn.wo.kernel": P(None, None, both),
        "moe_blocks.ffn.router.kernel": P(None, both, None),
        "moe_blocks.ffn.experts.w13": P(None, "expert", "data", None),
        "moe_blocks.ffn.experts.w2": P(None, "expert", None, "data"),
        "mtp.proj.kernel": P(None, None, both),
        "final_norm.gain": P(None),
    }
    for name, spec in expected.items():
        shape, axes = weights[name]
        assert weight_sharding(MESH, shape, axes, "fsdp_ep").spec == spec, name


def test_a_dim_that_its_axes_do_not_divide_uses_fewer():
    axes = ("embed", "ffn")
    assert weight_sharding(MESH, (16, 6), axes, "fsdp_ep").spec == P(("data", "expert"), None)
    assert weight_sharding(MESH, (6, 16), axes, "fsdp_ep").spec == P(("data",), None)
    assert weight_sharding(MESH, (5, 16), axes, "fsdp_ep").spec == P(None, None)


def test_colliding_axes_and_unknown_names_raise():
    with pytest.raises(ValueError, match="'embed' and 'expert_embed'.*'data'"):
        logical_to_spec(("embed", "expert_embed"), LAYOUTS["fsdp_ep"])
    with pytest.raises(ValueError, match="'embed' and 'embed'"):
        logical_to_spec(("embed", "embed"), LAYOUTS["fsdp_ep"])
    with pytest.raises(ValueError, match="'embde' is not in the layout"):
        logical_to_spec(("embde", "ffn"), LAYOUTS["zero1_ep"])


_DENSE, _EXPERTS = ("embed", "ffn"), ("expert", "expert_embed", "expert_ffn")


@pytest.mark.parametrize(
    ("shape", "axes", "layout", "expected"),
    [
        ((8, 6), _DENSE, "zero1_ep", P(("data", "expert"), None)),  # both axes are free
        ((6, 8), _DENSE, "zero1_ep", P(None, ("data", "expert"))),  # but divide a later dim only
        ((6, 5), _DENSE, "zero1_ep", P("data", None)),  # or one of them divides
        ((5, 7), _DENSE, "zero1_ep", P(None, None)),
        ((3, 8, 6, 4), _EXPERTS, "zero1_ep", P(None, "expert", "data", None)),  # 3 layers stacked
        ((8, 6, 5), _EXPERTS, "fsdp_ep", P("expert", "data", None)),  # the weight took them all
    ],
)
def test_optimizer_state_takes_the_axes_its_weight_leaves_free(shape, axes, layout, expected):
    weight = weight_sharding(MESH, shape, axes, layout)
    assert optimizer_sharding(weight, shape).spec == expected


PIPED = AbstractMesh((2, 2, 4), AXES)


@pytest.mark.parametrize(
    ("shape", "axes", "layout", "weight", "state"),
    [
        # The first free width that `pipe` divides; never the stack of layers.
        (
            (6, 8, 16), _DENSE, "zero1_ep",
            P(None, "pipe", None), P(None, "pipe", ("data", "expert")),
        ),
        ((6, 7, 16), _DENSE, "zero1_ep", P(None, None, "pipe"), P("data", None, "pipe")),
        ((6, 16, 6), _DENSE, "fsdp_ep", P(None, ("data", "expert"), "pipe"), None),
        (
            (6, 8, 6, 4), _EXPERTS, "zero1_ep",
            P(None, "expert", "pipe", None), P("data", "expert", "pipe", None),
        ),
        ((6, 8, 6, 4), _EXPERTS, "fsdp_ep", P(None, "expert", "data", "pipe"), None),
        ((6, 7), ("embed",), "zero1_ep", P(None, None), P("data", None)),
    ],
)  # fmt: skip
def test_a_pipeline_also_splits_a_width_over_its_ranks(shape, axes, layout, weight, state):
    sharding = weight_sharding(PIPED, shape, axes, layout)
    assert sharding.spec == weight
    assert optimizer_sharding(sharding, shape).spec == (state or weight)


def test_mesh_and_batch():
    parallel = dataclasses.replace(tiny().parallel, data=2, expert=4)
    mesh = make_mesh(parallel)
    assert mesh.shape == {"pipe": 1, "data": 2, "expert": 4}
    assert batch_sharding(mesh).spec == P(("data", "expert"))
    assert batch_sharding(mesh, leading=1).spec == P(None, ("data", "expert"))
    assert batch_sharding(mesh).shard_shape((16, 3)) == (2, 3)
    with pytest.raises(UserError, match="needs 16 devices but 8 cpu device"):
        make_mesh(dataclasses.replace(parallel, expert=8))
    with pytest.raises(
        UserError, match="pipe 2 x data 2 x expert 4 needs 16 .*lower one of parallel.pipe"
    ):
        make_mesh(dataclasses.replace(parallel, pipe=2))
    assert isinstance(make_mesh(parallel, jax.devices()[::-1]), Mesh)

"""The fused pair of a forward and a backward: the same numbers, in the order of the paper."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import rope
from dsv3_jax.model.block import Block, remat
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.pipeline.interleave import cut
from dsv3_jax.parallel.pipeline.split import split_layer

CONFIG = replace(
    tiny().model,
    width=32,
    expert_ffn_width=16,
    num_heads=2,
    num_experts=4,
    num_groups=2,
    num_groups_kept=2,
    init_std=0.2,
)
B, T, RANKS = 1, 16, 2
MATMULS = {"dot_general", "ragged_dot_general"}


@cache
def traced(policy: str):
    """The pair as one and as its parts, of (params, x ahead, x behind, dy); and arguments."""
    mesh = Mesh(np.array(jax.devices()[:RANKS]).reshape(1, RANKS), ("data", "expert"))
    runtime = Runtime(shard_of=mesh, remat=policy)
    rng = np.random.default_rng()
    block = Block(CONFIG, moe=True, runtime=runtime, rngs=nnx.Rngs(int(rng.integers(2**31))))
    graphdef, params, bias = nnx.split(block, nnx.Param, RouterBias)
    cos_sin = rope.cos_sin(rope.positions(T), CONFIG)

    def layer(params, constants, x_BTD):
        def run(x_BTD, params):
            y_BTD, stats = nnx.merge(graphdef, params, constants)(x_BTD, cos_sin=cos_sin)
            return y_BTD, stats.counts_E

        return remat(run, runtime, in_scan=True)(x_BTD, params)

    def on_device(run):
        def of_shard(params, ahead, behind, dy):
            split = split_layer(layer, params, bias, ahead)
            return run(split, split.prepare(params), params, ahead, behind, dy)

        specs = jax.tree.map(lambda p: P("expert") if p.ndim == 3 else P(), params)
        rows = P("expert")
        return jax.shard_map(
            of_shard,
            mesh=mesh,
            in_specs=(specs, rows, rows, rows),
            out_specs=P("expert"),
            check_vma=False,
        )

    def fused(split, derived, params, ahead, behind, dy):
        _, _, residuals = split.forward(derived, bias, behind)
        jax.lax.optimization_barrier(residuals)  # where `steps_of` begins
        forward, dx, d_params = split.forward_and_backward(
            (derived, bias, ahead), (derived, bias, residuals, dy)
        )
        return jax.tree.map(jnp.atleast_1d, (forward, dx, d_params))

    def apart(split, derived, params, ahead, behind, dy):
        _, _, residuals = split.forward(derived, bias, behind)
        forward = split.forward(derived, bias, ahead)
        dx, weight_residuals = split.backward(derived, bias, residuals, dy)
        d_params = split.weight(derived, bias, residuals, weight_residuals)
        return jax.tree.map(jnp.atleast_1d, (forward, dx, d_params))

    arrays = [
        jnp.asarray(rng.normal(size=(RANKS * B, T, CONFIG.width)), jnp.float32) for _ in "abc"
    ]
    return on_device(fused), on_device(apart), (params, *arrays)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_the_pair_computes_what_its_parts_compute(policy):
    fused, apart, args = traced(policy)
    ours, expected = jax.jit(lambda *args: (fused(*args), apart(*args)))(*args)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(leaf, other, atol=1e-6 * scale)


def steps_of(jaxpr) -> list[list]:
    """The equations after each barrier, those of the body of the `shard_map`."""
    (body,) = (eqn.params["jaxpr"] for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map")
    body = getattr(body, "jaxpr", body)
    steps = [[]]
    for eqn in body.eqns:
        steps.append([]) if eqn.primitive.name == "optimization_barrier" else steps[-1].append(eqn)
    return steps[1:]


def scopes_of(eqns, primitives) -> list[str]:
    """The outermost scope of each equation that is, or holds, one of `primitives`."""
    scopes = []
    for eqn in eqns:
        inner = (jaxpr.eqns for jaxpr in jaxprs_in_params(eqn.params))
        if eqn.primitive.name in primitives or any(scopes_of(e, primitives) for e in inner):
            scopes.append(str(eqn.source_info.name_stack).split("/")[0])
    return scopes


@pytest.mark.parametrize("policy", ["none", "full"])
def test_pieces_follow_each_other_as_published(policy):
    fused, _, args = traced(policy)
    steps = steps_of(jax.make_jaxpr(fused)(*args).jaxpr)
    redone = policy == "full"  # attention and the dispatch of the rows and their choices
    assert [set(scopes_of(step, MATMULS)) for step in steps] == [
        {"forward", "backward"} if redone else {"forward"},  # attention(F), and of B if redone
        {"backward"},  # MLP(B)
        {"weight"},  # MLP(W)
        {"forward"},  # MLP(F)
        {"backward"},  # attention(B)
        {"weight"},  # attention(W)
        set(),
    ]
    # Where each is started: the next step that multiplies for the same chunk needs it.
    assert [sorted(scopes_of(step, {"all_to_all"})) for step in steps] == [
        ["backward"] * (3 if redone else 1) + ["forward"] * 2,  # combine(B), dispatch(F)
        ["backward"] * 2,  # dispatch(B)
        [],
        ["forward"],  # combine(F)
        [],
        [],
        [],
    ]


def test_equations_that_do_not_communicate_twice_stay_together():
    jaxpr = jax.make_jaxpr(lambda x: jnp.tanh(x @ x) @ x)(jnp.ones((2, 2))).jaxpr
    assert cut(jaxpr.eqns) == [[], jaxpr.eqns, []]

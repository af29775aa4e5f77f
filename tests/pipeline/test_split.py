"""F, B and W of the real block against jax.vjp, and what each of them runs and passes on."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

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
from dsv3_jax.parallel.pipeline.split import split_layer
from dsv3_jax.precision import fp8
from dsv3_jax.precision.policy import PUBLISHED
from dsv3_jax.train.losses import balance_loss

CONFIG = replace(
    tiny().model,
    width=48,
    expert_ffn_width=32,
    num_heads=2,
    q_latent_dim=40,
    v_head_dim=28,
    kv_latent_dim=24,
    num_experts=4,
    num_groups=2,
    num_groups_kept=1,
    init_std=0.2,
)
B, T = 2, 22  # so that no activation has the shape of a kernel
# Five of attention, two of the shared expert, two of the routed experts; the router is no FP8.
NUM_FP8_WEIGHTS, NUM_WEIGHTS = 9, 10


def make_layer(compute: str, policy: str):
    """The layer, its parameters, constants (documents and a mask among them) and input."""
    low = jnp.dtype("float32" if compute == "float32" else "bfloat16")
    runtime = Runtime(compute_dtype=low, fp8=PUBLISHED if compute == "fp8" else None, remat=policy)
    rng = np.random.default_rng()
    seed = int(rng.integers(2**31))
    block = Block(CONFIG, moe=True, runtime=runtime, rngs=nnx.Rngs(seed))
    graphdef, params, bias = nnx.split(block, nnx.Param, RouterBias)
    bias = jax.tree.map(lambda b: jnp.asarray(rng.normal(0, 0.1, b.shape), b.dtype), bias)
    segments_BT = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
    constants = {
        "bias": bias,
        "cos_sin": rope.cos_sin(rope.positions(T, segments_BT), CONFIG),
        "segments": segments_BT,
        "mask": rng.random((B, T)) < 0.8,
        "unused": None,
    }

    def layer(params, constants, x_BTD):
        def run(x_BTD, params):
            y_BTD, stats = nnx.merge(graphdef, params, constants["bias"])(
                x_BTD,
                cos_sin=constants["cos_sin"],
                segments_BT=constants["segments"],
                token_mask_BT=constants["mask"],
            )
            return (y_BTD, balance_loss(stats, tiny().balance)), stats.counts_E

        return remat(run, runtime, in_scan=True)(x_BTD, params)

    x_BTD = jnp.asarray(rng.normal(size=(B, T, CONFIG.width)), low)
    dy_BTD = jnp.asarray(rng.normal(size=x_BTD.shape), low)
    return layer, params, constants, x_BTD, (dy_BTD, jnp.float32(rng.normal()))


def of_vjp(layer, params, constants, x, d_outputs):
    def differentiated(params, x):
        return layer(params, constants, x)

    outputs, pull_back, extra = jax.vjp(differentiated, params, x, has_aux=True)
    return outputs, extra, *pull_back(d_outputs)


def of_pieces(split, params, constants, x, d_outputs, each=lambda piece: piece):
    """As `of_vjp`; each of the pieces goes through `each`."""
    derived = each(split.prepare)(params)
    outputs, extra, residuals = each(split.forward)(derived, constants, x)
    dx, weight_residuals = each(split.backward)(derived, constants, residuals, d_outputs)
    for arrays, shapes in (
        (residuals, split.residual_shapes),
        (weight_residuals, split.weight_residual_shapes),
    ):
        assert [(a.shape, a.dtype) for a in arrays] == [(s.shape, s.dtype) for s in shapes]
    d_params = each(split.weight)(derived, constants, residuals, weight_residuals)
    return outputs, extra, d_params, dx


@cache
def traced(compute: str, policy: str):
    """A layer, its pieces, and their equations by name."""
    layer, *arrays, d_outputs = make_layer(compute, policy)
    split = split_layer(layer, *arrays)
    return layer, (*arrays, d_outputs), split, jaxprs(split, *arrays, d_outputs)


def jaxprs(split, params, constants, x, d_outputs):
    made = {}

    def record(piece):
        def run(*args):
            name = ("prepare", "forward", "backward", "weight")[len(made)]
            made[name] = jax.make_jaxpr(piece)(*args).jaxpr
            return jax.eval_shape(piece, *args)

        return run

    of_pieces(split, params, constants, x, d_outputs, record)
    return made


def equations(jaxpr) -> Iterator:
    """Every equation, those of a loop's body once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def count(jaxpr, primitive: str) -> int:
    return sum(eqn.primitive.name == primitive for eqn in equations(jaxpr))


def num_bytes(shapes) -> int:
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in shapes)


def assert_close(tree, expected_tree, tolerance):
    paths = jax.tree_util.tree_flatten_with_path(expected_tree)[0]
    for leaf, (path, expected) in zip(jax.tree.leaves(tree), paths, strict=True):
        assert leaf.dtype == expected.dtype, path
        leaf, expected = np.asarray(leaf, np.float64), np.asarray(expected, np.float64)
        assert np.linalg.norm(expected) > 0, path
        error = np.linalg.norm(leaf - expected) / np.linalg.norm(expected)
        assert error <= tolerance, (path, error)


@pytest.mark.parametrize(
    "compute, policy",
    [
        ("float32", "none"),
        ("float32", "paper"),
        ("float32", "full"),
        ("bfloat16", "paper"),
        pytest.param("fp8", "paper", marks=pytest.mark.slow),
    ],
)
def test_pieces_equal_vjp(compute, policy):
    layer, arrays, split, _ = traced(compute, policy)
    # In one program, so that the compiler treats the same maths in the same way.
    both = jax.jit(lambda *arrays: (of_pieces(split, *arrays), of_vjp(layer, *arrays)))
    ours, expected = both(*arrays)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(ours[2])} == {jnp.dtype("float32")}
    assert_close(ours, expected, 1e-6 if compute == "float32" else 0.0)


@pytest.mark.parametrize("compute", ["float32", "fp8"])
def test_nothing_is_multiplied_twice_and_weights_only_multiply_for_their_gradients(compute):
    layer, arrays, _, parts = traced(compute, "none")
    whole = jax.make_jaxpr(partial(of_vjp, layer))(*arrays).jaxpr
    matmuls = {name: count(jaxpr, "dot_general") for name, jaxpr in parts.items()}
    assert matmuls["prepare"] == 0
    assert sum(matmuls.values()) == count(whole, "dot_general")
    assert matmuls["forward"] > NUM_WEIGHTS and matmuls["backward"] > NUM_WEIGHTS
    assert matmuls["weight"] == NUM_WEIGHTS
    for policy in ("paper", "full"):
        recomputing = traced(compute, policy)[-1]
        assert count(recomputing["weight"], "dot_general") == NUM_WEIGHTS
        assert count(recomputing["forward"], "dot_general") == matmuls["forward"]
        assert count(recomputing["backward"], "dot_general") > matmuls["backward"]


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "fp8"])
def test_the_policy_decides_what_is_kept(compute):
    kept = {p: traced(compute, p)[2].residual_shapes for p in ("none", "paper", "full")}
    assert num_bytes(kept["paper"]) < num_bytes(kept["none"])
    x = traced(compute, "full")[1][2]
    assert [(s.shape, s.dtype) for s in kept["full"]] == [(x.shape, x.dtype)]


@pytest.mark.parametrize("policy", ["none", "paper", "full"])
def test_weights_are_cast_in_prepare_and_masters_stay_out_of_what_it_returns(policy):
    _, (params, *_), split, parts = traced("bfloat16", policy)
    derived = jax.eval_shape(split.prepare, params)
    kernels = [leaf.shape for leaf in jax.tree.leaves(params) if leaf.ndim > 1]
    assert len(kernels) == NUM_WEIGHTS
    assert sorted(s.shape for s in derived if s.dtype == jnp.bfloat16) == sorted(kernels)
    assert all(s.ndim == 1 for s in derived if s.dtype == jnp.float32)  # gains of norms
    for name in ("forward", "backward", "weight"):
        converted = [
            eqn.invars[0].aval
            for eqn in equations(parts[name])
            if eqn.primitive.name == "convert_element_type"
        ]
        shapes = {aval.shape for aval in converted if aval.dtype == jnp.float32}
        assert shapes and not shapes & set(kernels), name


@pytest.mark.parametrize("policy", ["none", "paper", "full"])
def test_weights_are_quantised_in_prepare_alone(policy, monkeypatch):
    original = fp8.quantize_blocks

    def quantize_blocks(w_NK):
        with jax.named_scope("quantize_weight"):
            return original(w_NK)

    monkeypatch.setattr(fp8, "quantize_blocks", quantize_blocks)
    layer, *arrays, d_outputs = make_layer("fp8", policy)
    split = split_layer(layer, *arrays)
    derived = jax.eval_shape(split.prepare, arrays[0])
    masters = {leaf.shape for leaf in jax.tree.leaves(arrays[0]) if leaf.ndim > 1}
    assert not masters & {s.shape for s in derived if s.dtype == jnp.float32}
    codes = {}
    for name, jaxpr in jaxprs(split, *arrays, d_outputs).items():
        codes[name] = sum(
            "quantize_weight" in str(eqn.source_info.name_stack)
            and eqn.primitive.name == "convert_element_type"
            and eqn.outvars[0].aval.dtype == jnp.float8_e4m3fn
            for eqn in equations(jaxpr)
        )
    assert codes == {"prepare": NUM_FP8_WEIGHTS, "forward": 0, "backward": 0, "weight": 0}


def test_scopes_say_which_piece_an_operation_belongs_to():
    for name, jaxpr in traced("float32", "paper")[-1].items():
        assert all(str(eqn.source_info.name_stack).startswith(name) for eqn in jaxpr.eqns)


def across_devices(function, num_inputs):
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",))
    rows = P("expert")
    return jax.shard_map(
        function, mesh=mesh, in_specs=(rows,) * num_inputs, out_specs=rows, check_vma=False
    )


def exchange(x):
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


@pytest.mark.parametrize("policy", ["none", "full"])
def test_communication_is_in_forward_and_backward_only(policy):
    rng = np.random.default_rng()
    params = {k: jnp.asarray(rng.normal(size=(2, 6, 6)), jnp.float32) for k in "abc"}
    x, dy = (jnp.asarray(rng.normal(size=(2, 8, 6)), jnp.float32) for _ in range(2))

    def layer(params, constants, x):
        def run(params, x):
            h = jax.nn.silu(exchange(x @ params["a"]) @ params["b"])
            return x + exchange(h) @ params["c"], jnp.sum(x)

        return remat(run, Runtime(remat=policy), in_scan=True)(params, x)

    counts = {}

    def with_pieces(params, x, dy):
        params, x, dy = jax.tree.map(lambda a: a[0], (params, x, dy))
        split = split_layer(layer, params, None, x)
        made = jaxprs(split, params, None, x, dy)
        counts.update({name: count(jaxpr, "all_to_all") for name, jaxpr in made.items()})
        return jax.tree.map(lambda a: a[None], of_pieces(split, params, None, x, dy))

    def with_vjp(params, x, dy):
        params, x, dy = jax.tree.map(lambda a: a[0], (params, x, dy))
        return jax.tree.map(lambda a: a[None], of_vjp(layer, params, None, x, dy))

    ours, expected = (jax.jit(across_devices(f, 3))(params, x, dy) for f in (with_pieces, with_vjp))
    assert_close(ours, expected, 1e-6)
    redone = 2 if policy == "full" else 0
    assert counts == {"prepare": 0, "forward": 2, "backward": 2 + redone, "weight": 0}


def test_a_weight_gradient_that_waits_for_other_devices_is_refused():
    def layer(w, constants, x):
        known = jax.lax.stop_gradient(x)
        return x + known * exchange(known @ w), None

    def trace(w, x):
        split_layer(layer, w[0], None, x[0])
        return x

    with pytest.raises(AssertionError, match="waits for other devices: all_to_all"):
        across_devices(trace, 2)(jnp.ones((2, 6, 6)), jnp.ones((2, 8, 6)))

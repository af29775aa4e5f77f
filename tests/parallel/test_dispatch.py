"""Dispatch and combine on 8 emulated devices: every back end against dense numpy experts."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from moe_reference import choices, relative_error, routed_experts

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model.moe import MoE, routed_ffn
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel import expert_parallel
from dsv3_jax.parallel.dispatch_ragged import RaggedHop, Segments
from dsv3_jax.parallel.mesh import BATCH_AXES

D, F, E, K = 12, 8, 16, 3
ROWS, EXPERTS = PartitionSpec(BATCH_AXES), PartitionSpec("expert")
BACKENDS = {
    "padded": dict(dispatch="padded"),
    "ragged": dict(dispatch="ragged"),
    "hierarchical": dict(dispatch="hierarchical", devices_per_node=2),
    # Room enough for any routing of these tests.
    "capped": dict(dispatch="padded", buffer_factor=8.0),
    "capped hierarchical": dict(dispatch="hierarchical", devices_per_node=2, buffer_factor=8.0),
}
CASES = [
    (1, 1, "padded"),
    *((data, expert, name) for data, expert in ((2, 4), (1, 8), (4, 2)) for name in BACKENDS),
]


@cache
def make_runtime(data: int, expert: int, backend: str) -> Runtime:
    devices = np.array(jax.devices()[: data * expert]).reshape(1, data, expert)
    return Runtime(mesh=Mesh(devices, ("pipe", "data", "expert")), **BACKENDS[backend])


@cache
def make_run(data: int, expert: int, backend: str):
    runtime = make_runtime(data, expert, backend)

    @jax.jit
    def value_and_gradients(x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, dy_XD):
        def function(x_XD, weights_XK, w13_ED2F, w2_EFD):
            return expert_parallel.apply_experts(
                partial(routed_ffn, runtime=runtime),
                x_XD,
                ids_XK,
                weights_XK,
                w13_ED2F,
                w2_EFD,
                runtime=runtime,
            )

        y_XD, transpose, overflow = jax.vjp(
            function, x_XD, weights_XK, w13_ED2F, w2_EFD, has_aux=True
        )
        return y_XD, transpose(dy_XD), overflow

    return value_and_gradients


def operands(num_tokens, pattern):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    ids_XK = choices(rng, num_tokens, E, K, pattern)
    weights_XK = rng.uniform(0.1, 1.0, size=(num_tokens, K)).astype(np.float32)
    weights = normal(E, D, 2 * F), normal(E, F, D)
    return normal(num_tokens, D), ids_XK, weights_XK, *weights, normal(num_tokens, D)


@pytest.mark.parametrize("pattern", ["any", "one_expert", "idle"])
@pytest.mark.parametrize(("data", "expert", "backend"), CASES)
def test_equals_dense_experts(data, expert, backend, pattern):
    arrays = operands(37, pattern)  # 37 tokens: no mesh divides them
    y_XD, gradients, overflow = make_run(data, expert, backend)(*arrays)
    assert overflow == 0
    expected_y, expected_gradients = routed_experts(*arrays)
    assert relative_error(y_XD, expected_y) <= 1e-5
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected) <= 1e-5


@pytest.mark.parametrize("dispatch", [b for b in BACKENDS if b.startswith("capped")])
def test_rows_without_room_are_counted(dispatch):
    """By hand: two devices have room for C rows, an owner for P pairs of a row and an expert."""
    factor = 1.0
    runtime = dataclasses.replace(make_runtime(1, 8, dispatch), buffer_factor=factor)
    hops = expert_parallel.make_hops(runtime, 5, K)
    x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD, _ = operands(40, "one_expert")

    @jax.jit
    def run(ids_XK):
        function = partial(routed_ffn, runtime=runtime)
        arrays = x_XD, ids_XK, weights_XK, w13_ED2F, w2_EFD
        return expert_parallel.apply_experts(function, *arrays, runtime=runtime)

    assert run(ids_XK)[1] > 0
    if len(hops) == 1:
        owners = [sorted({e // 2 for e in row}) for row in ids_XK.tolist()]
        rows = np.zeros((8, 8), int)  # [sender, owner]
        for token, devices in enumerate(owners):
            rows[token // 5, devices] += 1
        no_room = np.maximum(rows - hops[0].capacity, 0).sum()
        assert 0 < no_room <= run(ids_XK)[1] <= no_room + ids_XK.size
    spread_out = (np.arange(40)[:, None] * 2 + np.array([0, 5, 10])) % E  # as even as can be
    assert run(spread_out.astype(np.int32))[1] == 0


def on_shards(function, runtime, num_inputs):
    """`function` of each shard's rows; what it returns is stacked over shards."""
    return jax.jit(
        jax.shard_map(
            function,
            mesh=runtime.mesh,
            in_specs=(ROWS,) * num_inputs,
            out_specs=ROWS,
            check_vma=False,
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_reaches_each_owner_once_with_its_choices(backend):
    runtime = make_runtime(1, 8, backend)
    hops = expert_parallel.make_hops(runtime, 5, K)
    x_XD, ids_XK, weights_XK, *_ = operands(40, "any")

    def received(x_XD, ids_XK, weights_XK):
        sent = expert_parallel.dispatch(x_XD, ids_XK, weights_XK, num_experts=E, hops=hops)
        return sent.rows_RD, sent.ids_RK, sent.weights_RK

    rows, ids, weights = (
        np.asarray(a).reshape(8, -1, a.shape[-1])
        for a in on_shards(received, runtime, 3)(x_XD, ids_XK, weights_XK)
    )
    for device in range(8):
        owned = range(2 * device, 2 * device + 2)
        expected = {}
        for x_D, ids_K, weights_K in zip(x_XD, ids_XK, weights_XK, strict=True):
            here = {int(e): w for e, w in zip(ids_K, weights_K, strict=True) if e in owned}
            if here:
                expected[x_D.tobytes()] = here
        got = {}
        for x_D, ids_K, weights_K in zip(rows[device], ids[device], weights[device], strict=True):
            if x_D.any():
                assert x_D.tobytes() not in got, "sent twice"
                chosen = zip(ids_K, weights_K, strict=True)
                got[x_D.tobytes()] = {int(e) + owned[0]: w for e, w in chosen if e < 2}
            else:
                assert (ids_K == 2).all()  # a row that nobody sent goes to no expert
        assert got == expected


def test_hierarchical_sends_one_copy_to_each_node_the_router_kept():
    # 8 devices in 4 nodes of 2; a node holds one group of the router, which keeps 2.
    config = dataclasses.replace(tiny().model, num_experts=E, experts_per_token=4)
    assert (config.num_groups, config.num_groups_kept) == (4, 2)
    runtime = make_runtime(1, 8, "hierarchical")
    layer = MoE(config, runtime=Runtime(), rngs=nnx.Rngs(0))
    u_BTD = jax.random.normal(jax.random.key(0), (8, 5, config.width))
    ids_XK = np.asarray(jax.jit(lambda u: layer.router(u)[0])(u_BTD)).reshape(-1, 4)
    x_XD = np.arange(1.0, 41.0, dtype=np.float32)[:, None]  # a token is known by its value
    node_hop, device_hop = expert_parallel.make_hops(runtime)

    def rows_after(hops):
        def received(x_XD, ids_XK, weights_XK):
            sent = expert_parallel.dispatch(x_XD, ids_XK, weights_XK, num_experts=E, hops=hops)
            return sent.rows_RD

        weights_XK = np.ones((40, 4), np.float32)
        rows = np.asarray(on_shards(received, runtime, 3)(x_XD, ids_XK, weights_XK))
        tokens = rows.reshape(8, -1).round().astype(int) - 1
        return [sorted(row[row >= 0]) for row in tokens]  # tokens that each device holds

    for device, tokens in enumerate(rows_after((node_hop,))):
        node, place = divmod(device, 2)
        expected = [
            t
            for t in range(40)
            if (t // 5) % 2 == place and (ids_XK[t] // 4 == node).any()  # 5 tokens a device
        ]
        assert tokens == expected
    crossings = np.bincount(np.concatenate(rows_after((node_hop,))), minlength=40)
    assert crossings.max() <= config.num_groups_kept and crossings.min() >= 1
    for device, tokens in enumerate(rows_after((node_hop, device_hop))):
        assert tokens == [t for t in range(40) if (ids_XK[t] // 2 == device).any()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_combine_is_the_transpose_of_dispatch_and_its_derivative(backend):
    runtime = make_runtime(2, 4, backend)
    hops = expert_parallel.make_hops(runtime, 5, K)
    x_XD, ids_XK, weights_XK, *_ = operands(40, "one_expert")

    def both(x_XD, ids_XK, weights_XK):
        def rows(x_XD):
            sent = expert_parallel.dispatch(x_XD, ids_XK, weights_XK, num_experts=E, hops=hops)
            return sent.rows_RD, sent.plans

        rows_RD, plans = rows(x_XD)
        y_RD = jax.random.normal(jax.random.key(jax.lax.axis_index("expert")), rows_RD.shape)
        back_XD, transpose = jax.vjp(
            lambda y_RD: expert_parallel.combine(y_RD, plans, hops=hops), y_RD
        )
        (derivative_RD,) = transpose(x_XD)
        (gradient_XD,) = jax.vjp(lambda x_XD: rows(x_XD)[0], x_XD)[1](y_RD)
        products = jnp.stack([jnp.vdot(rows_RD, y_RD), jnp.vdot(x_XD, back_XD)])[None]
        return products, back_XD, gradient_XD, rows_RD, derivative_RD

    products, back_XD, gradient_XD, rows_RD, derivative_RD = on_shards(both, runtime, 3)(
        x_XD, ids_XK, weights_XK
    )
    sent_dot_y, x_dot_returned = np.asarray(products, np.float64).sum(0)
    np.testing.assert_allclose(sent_dot_y, x_dot_returned, rtol=1e-5)
    np.testing.assert_array_equal(back_XD, gradient_XD)
    np.testing.assert_array_equal(rows_RD, derivative_RD)


def test_ragged_move_follows_the_definition_of_the_primitive():
    # Offsets with gaps and segments out of order, as the primitive allows.
    mesh = make_runtime(1, 4, "ragged").mesh
    rng = np.random.default_rng(0)
    num_in, num_out, s = 30, 40, 4
    sizes = rng.integers(0, 7, size=(s, s))  # [sender, receiver]
    input_offsets = np.stack([rng.permutation(s) * 7 for _ in range(s)])
    output_offsets = np.stack([rng.permutation(s) * 9 for _ in range(s)]).T  # [sender, receiver]
    rows = rng.normal(size=(s, num_in, 2)).astype(np.float32)
    expected = np.zeros((s, num_out, 2), np.float32)
    for sender in range(s):
        for receiver in range(s):
            size = sizes[sender, receiver]
            start, place = input_offsets[sender, receiver], output_offsets[sender, receiver]
            expected[receiver, place : place + size] = rows[sender, start : start + size]

    def move(rows, *segments):
        hop = RaggedHop("expert", s, "cpu")
        return hop.move(rows[0], num_out, Segments(*(a[0] for a in segments)))[None]

    arrays = rows, input_offsets, sizes, output_offsets, sizes.T
    spec = PartitionSpec("expert")
    moved = jax.jit(jax.shard_map(move, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        *arrays
    )
    np.testing.assert_array_equal(moved, expected)


def test_ragged_sends_only_what_is_needed():
    runtime = make_runtime(1, 8, "ragged")
    (hop,) = expert_parallel.make_hops(runtime)
    ids_XK = operands(40, "any")[1]
    sent_SX = on_shards(lambda ids_XK: hop.plan(ids_XK // 2).there.send_sizes[None], runtime, 1)
    received = on_shards(lambda ids_XK: hop.plan(ids_XK // 2).there.recv_sizes[None], runtime, 1)
    owners = [sorted({e // 2 for e in row}) for row in ids_XK.tolist()]
    expected = np.zeros((8, 8), int)
    for token, devices in enumerate(owners):
        expected[token // 5, devices] += 1
    np.testing.assert_array_equal(sent_SX(ids_XK), expected)
    np.testing.assert_array_equal(received(ids_XK), expected.T)


@pytest.fixture(scope="module")
def layer_results():
    """Loss, outputs, statistics and every gradient of a whole layer, by mesh and back end."""
    config = dataclasses.replace(
        tiny().model, width=16, expert_ffn_width=8, num_experts=E, init_std=0.3
    )
    u_BTD = jax.random.normal(jax.random.key(1), (8, 6, config.width))
    dy_BTD = jax.random.normal(jax.random.key(2), u_BTD.shape)
    mask_BT = np.arange(6) < np.array([6, 6, 5, 4, 3, 2, 6, 6])[:, None]

    def run(runtime):
        layer = MoE(config, runtime=runtime, rngs=nnx.Rngs(0))
        graphdef, params, bias = nnx.split(layer, nnx.Param, RouterBias)

        @jax.jit
        @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def loss(params, u_BTD):
            y_BTD, stats = nnx.merge(graphdef, params, bias)(u_BTD, mask_BT)
            return jnp.vdot(y_BTD, dy_BTD) + sum(stats[1:5]), (y_BTD, stats)

        (value, aux), (d_params, du_BTD) = loss(params, u_BTD)
        return value, *aux, nnx.to_pure_dict(d_params), du_BTD

    runtimes = [make_runtime(2, 4, "padded"), make_runtime(1, 8, "hierarchical")]
    return run(Runtime()), [run(runtime) for runtime in runtimes]


def test_layer_does_not_depend_on_the_mesh(layer_results):
    single, meshed = layer_results
    for result in meshed:
        np.testing.assert_array_equal(result[2].counts_E, single[2].counts_E)
        assert result[2].overflow == single[2].overflow == 0
        result, single_result = (
            (r[0], r[1], r[2]._replace(overflow=1.0), *r[3:]) for r in (result, single)
        )
        errors = jax.tree.map(relative_error, result, single_result)
        assert max(jax.tree.leaves(errors)) <= 1e-5, errors


def test_expert_gradients_stay_on_their_shard(layer_results):
    _, (result, _) = layer_results
    spec = result[3]["experts"]["w13"].sharding.spec
    assert spec[0] == "expert"

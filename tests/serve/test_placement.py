"""Experts in several slots: same output, no recompilation, even load, on one and eight devices."""

import dataclasses
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from moe_reference import relative_error

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.errors import UserError
from dsv3_jax.model.generate import _decode, _prefill
from dsv3_jax.model.moe import Replicas
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.precision.block_scaled import BlockScaled
from dsv3_jax.serve import eplb, placement

CONFIG = dataclasses.replace(
    tiny().model,
    vocab_size=64,
    width=32,
    num_layers=3,
    dense_ffn_width=48,
    expert_ffn_width=16,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    q_latent_dim=20,
    kv_latent_dim=12,
    num_experts=16,
    experts_per_token=4,
    num_groups=4,
    num_groups_kept=2,
    mtp_depth=1,
    init_std=0.3,
)
E, R, MAIN = 16, 24, CONFIG.num_moe_layers
LAYERS = MAIN + CONFIG.mtp_depth
PROMPTS, NEW = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (8, 4)), 6


def make_runtime(expert, **options):
    devices = np.array(jax.devices()[:8]).reshape(1, -1, expert)
    return Runtime(mesh=Mesh(devices, ("pipe", "data", "expert")), **options)


RUNTIMES = {
    "one device": Runtime,
    "padded": partial(make_runtime, 4),
    "hierarchical": partial(make_runtime, 8, dispatch="hierarchical", devices_per_node=2),
}


@cache
def first_weights():
    model = nnx.eval_shape(lambda: DeepSeekV3(CONFIG, runtime=Runtime(), rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def value(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "bias" in name:
            return np.zeros_like(noise)
        return 1.0 + 0.1 * noise if "gain" in name else CONFIG.init_std * noise

    return jax.tree_util.tree_map_with_path(value, nnx.state(model))


def make_model(name):
    runtime = RUNTIMES[name]()
    model = nnx.eval_shape(lambda: DeepSeekV3(CONFIG, runtime=runtime, rngs=nnx.Rngs(0)))
    return nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, first_weights()))


def random_load(seed):
    return np.random.default_rng(seed).zipf(1.5, (LAYERS, E)).clip(max=500)


def stacks(model):
    return model.moe_blocks.ffn, model.mtp.block.ffn


def assert_placed(model, placed):
    """Every slot holds the weights of its expert, and the tables say so."""
    reference = make_model("one device")
    for name in ("w13", "w2"):
        actual, expected = (
            np.concatenate([getattr(ffn.experts, name)[...] for ffn in stacks(m)])
            for m in (model, reference)
        )
        for layer, experts_R in enumerate(placed.slot_to_expert_LR):
            np.testing.assert_array_equal(actual[layer], expected[layer, experts_R])
    slots_LEC = np.concatenate([ffn.replicas.slots[...] for ffn in stacks(model)])
    np.testing.assert_array_equal(slots_LEC, placed.replicas_LEC)


@partial(jax.jit, static_argnums=0)
def layer(graphdef, state, u_BTD):
    """The last MoE layer of the main model: its output and the load of experts."""
    ffn = nnx.merge(graphdef, jax.tree.map(lambda x: x[MAIN - 1], state))
    y_BTD, stats = ffn(u_BTD)
    return y_BTD, stats.counts_E


@cache
def without_placement():
    u_BTD = np.random.default_rng(1).normal(size=(8, 9, CONFIG.width)).astype(np.float32)
    return u_BTD, *layer(*nnx.split(make_model("one device").moe_blocks.ffn), u_BTD)


@pytest.mark.parametrize("name", RUNTIMES)
def test_layer_output_does_not_depend_on_the_placement(name):
    u_BTD, expected, counts_E = without_placement()
    assert (counts_E > 0).all()  # every expert takes part
    model = make_model(name)
    placed = placement.plan(random_load(0), model, R)
    model = placement.expanded(model, placed)
    assert_placed(model, placed)
    results = [layer(*nnx.split(model.moe_blocks.ffn), u_BTD)]
    compiled = layer._cache_size()
    for seed in (1, 2):
        before, placed = placed, placement.plan(random_load(seed), model, R)
        assert (placed.slot_to_expert_LR != before.slot_to_expert_LR).any(-1).all()
        model = placement.moved(model, placed)
        results.append(layer(*nnx.split(model.moe_blocks.ffn), u_BTD))
    assert_placed(model, placed)
    assert layer._cache_size() == compiled
    if name != "one device":
        assert model.moe_blocks.ffn.experts.w13[...].sharding.spec[1] == "expert"
    for y_BTD, placed_counts_E in results:
        assert relative_error(y_BTD, expected) <= 1e-6
        np.testing.assert_array_equal(placed_counts_E, counts_E)


def test_greedy_tokens_stay_through_moves_without_a_recompilation():
    expected = np.asarray(make_model("one device").generate(PROMPTS, NEW))
    model = make_model("padded")
    placed = placement.plan(np.ones((LAYERS, E)), model, R)
    model = placement.expanded(model, placed)
    np.testing.assert_array_equal(model.generate(PROMPTS, NEW), expected)
    compiled = _prefill._cache_size(), _decode._cache_size()
    model = placement.moved(model, placement.rebalanced(random_load(3), placed, model))
    np.testing.assert_array_equal(model.generate(PROMPTS, NEW), expected)
    assert (_prefill._cache_size(), _decode._cache_size()) == compiled


@partial(jax.jit, static_argnums=0)
def chosen(graphdef, state, u_LXD):
    """Of every layer, the experts that the router chooses and the slots that they become."""

    def layer(state, u_XD):
        ffn = nnx.merge(graphdef, state)
        ids_XK = ffn.router(u_XD[None])[0][0]
        return ids_XK, ffn.replicas.choose(ids_XK)

    return jax.vmap(layer)(state, u_LXD)


def test_skewed_load_becomes_even():
    """Placed by the statistics of some tokens; measured on others, slot by slot."""
    model, num_devices = make_model("padded"), 4
    bias = model.moe_blocks.ffn.router.bias
    bias[...] = jnp.zeros((MAIN, E)).at[:, jnp.array([0, 1, 2])].set(0.4)
    placed = placement.plan(np.ones((MAIN, E)), model, R)  # without MTP
    model = placement.expanded(model, placed)
    seen_LXD, new_LXD = np.random.default_rng(0).normal(size=(2, MAIN, 2000, CONFIG.width))

    def measured(model, u_LXD):
        """Load of experts, and of slots."""
        choices = chosen(*nnx.split(model.moe_blocks.ffn), u_LXD.astype(np.float32))
        return (
            np.stack([np.bincount(np.ravel(ids_XK), minlength=size) for ids_XK in ids_LXK])
            for ids_LXK, size in zip(choices, (E, R), strict=True)
        )

    def by_device(load_L):
        return load_L.reshape(MAIN, num_devices, -1).sum(-1)

    load_LE, _ = measured(model, seen_LXD)
    assert (eplb.imbalance(by_device(load_LE)) > 2).all()  # experts in order, one slot each
    model = placement.moved(model, placement.rebalanced(load_LE, placed, model))
    new_load_LE, load_LR = measured(model, new_LXD)
    assert (eplb.imbalance(by_device(new_load_LE)) > 2).all()
    assert (eplb.imbalance(by_device(load_LR)) < 1.15).all()


def test_layers_that_would_not_gain_stay():
    model = make_model("padded")
    load_LE = random_load(0)
    placed = placement.plan(load_LE, model, R)
    load_LE[1] = random_load(4)[1]
    again = placement.rebalanced(load_LE, placed, model)
    changed_L = (again.slot_to_expert_LR != placed.slot_to_expert_LR).any(-1)
    assert changed_L.tolist() == [False, True, False]
    for table, planned in zip(again, placement.plan(load_LE, model, R), strict=True):
        np.testing.assert_array_equal(table[1], planned[1])


def test_copies_share_the_tokens_of_an_expert_evenly():
    slots_EC = jnp.array([[4, -1, -1, -1], [0, 2, 5, -1], [1, 3, -1, -1]])
    replicas = Replicas(slots_EC, jnp.array([1, 3, 2]))
    rng = np.random.default_rng(0)
    ids_XK = np.array([rng.permutation(3)[:2] for _ in range(300)], np.int32)
    ids_XK[::3] = [1, 3]  # 3: no expert
    slots_XK = np.asarray(replicas.choose(ids_XK))
    owners = {0: {4}, 1: {0, 2, 5}, 2: {1, 3}, 3: {6}}
    for expert, slots in owners.items():
        assert set(slots_XK[ids_XK == expert].tolist()) == slots
    every_token = np.ones((300, 1), np.int32)
    counts = np.bincount(np.ravel(replicas.choose(every_token)), minlength=6)
    assert counts.tolist() == [100, 0, 100, 0, 0, 100]


def test_fp8_weights_keep_their_scales():
    model = make_model("padded")
    sharding = NamedSharding(model.runtime.mesh, PartitionSpec(None, "expert"))
    codes = np.arange(MAIN * E).reshape(MAIN, E, 1, 1) * np.ones((1, 1, 32, 32))
    kernel = BlockScaled(
        jax.device_put(jnp.asarray(codes, jnp.float8_e4m3fn), sharding),
        jax.device_put(jnp.asarray(codes[..., :1, :2], jnp.float32), sharding),
        segments=2,
    )
    model.moe_blocks.ffn.experts.w13.set_value(kernel)
    placed = placement.plan(random_load(0)[:MAIN], model, R)
    weight = placement.expanded(model, placed).moe_blocks.ffn.experts.w13[...]
    expected = placed.slot_to_expert_LR + E * np.arange(MAIN)[:, None]
    np.testing.assert_array_equal(weight.scales[..., 0, 0], expected)
    rounded = expected.astype(jnp.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(weight.codes[..., 0, 0].astype(np.float32), rounded)
    assert weight.segments == 2


def test_devices_that_do_not_divide_experts_are_refused():
    devices = np.array(jax.devices()[:3]).reshape(1, 1, 3)
    runtime = Runtime(mesh=Mesh(devices, ("pipe", "data", "expert")))
    model = SimpleNamespace(config=CONFIG, runtime=runtime)
    with pytest.raises(UserError, match="16 experts on an 'expert' axis of 3 devices"):
        placement.plan(np.ones((LAYERS, E)), model, R)

"""The whole model: parameter tree, packed documents, MTP, number formats, recomputation."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model import rope
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3

CONFIG = dataclasses.replace(
    tiny().model,
    vocab_size=96,
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
    mtp_depth=2,
    init_std=0.2,
)
B, T = 2, 11


@functools.cache
def make_model(config=CONFIG, seed=0, **runtime):
    """A model with random weights, gains and router biases, none of them at its initial value."""
    model = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=Runtime(**runtime), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def value(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "gain" in name:
            return jnp.asarray(1.0 + 0.1 * noise)
        return jnp.asarray((0.05 if "bias" in name else config.init_std) * noise)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))


def random_tokens(seed=0, config=CONFIG):
    shape = (B, T)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(graphdef, state, tokens_BT, segments_BT=None):
    return nnx.merge(graphdef, state).hidden_states(tokens_BT, segments_BT=segments_BT)


def shapes_and_axes(model):
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {
        ".".join(map(str, path)): (variable.shape, variable.get_metadata()["axes"])
        for path, variable in params
    }


def test_parameter_tree():
    found = shapes_and_axes(make_model())
    D, Q, L, P, R, H, N, E, F = 32, 20, 12, 8, 4, 6, 2, 8, 16
    attention = {
        "norm_a.gain": ((D,), (None,)),
        "attn.wq_a.kernel": ((D, Q), ("embed", "q_latent")),
        "attn.q_norm.gain": ((Q,), (None,)),
        "attn.wq_b.kernel": ((Q, N * (P + R)), ("q_latent", "up_heads")),
        "attn.wkv_a.kernel": ((D, L + R), ("embed", "kv_latent")),
        "attn.kv_norm.gain": ((L,), (None,)),
        "attn.wkv_b.kernel": ((L, N * (P + H)), ("kv_latent", "up_heads")),
        "attn.wo.kernel": ((N * H, D), ("heads", "embed")),
        "norm_f.gain": ((D,), (None,)),
    }
    dense = attention | {
        "ffn.w13.kernel": ((D, 2 * 48), ("embed", "ffn")),
        "ffn.w2.kernel": ((48, D), ("ffn", "embed")),
    }
    moe = attention | {
        "ffn.router.kernel": ((D, E), ("embed", None)),
        "ffn.experts.w13": ((E, D, 2 * F), ("expert", "expert_embed", "expert_ffn")),
        "ffn.experts.w2": ((E, F, D), ("expert", "expert_ffn", "expert_embed")),
        "ffn.shared.w13.kernel": ((D, 2 * F), ("embed", "ffn")),
        "ffn.shared.w2.kernel": ((F, D), ("ffn", "embed")),
    }
    mtp = {f"block.{name}": value for name, value in moe.items()} | {
        "enorm.gain": ((D,), (None,)),
        "hnorm.gain": ((D,), (None,)),
        "proj.kernel": ((2 * D, D), (None, "embed")),
        "out_norm.gain": ((D,), (None,)),
    }
    expected = {
        "embed.table": ((96, D), ("vocab", "embed")),
        "final_norm.gain": ((D,), (None,)),
        "head.kernel": ((D, 96), ("embed", "vocab")),
    }
    for group, layers, members in (
        ("dense_blocks", 1, dense),
        ("moe_blocks", 2, moe),
        ("mtp", 2, mtp),
    ):
        for name, (shape, axes) in members.items():
            expected[f"{group}.{name}"] = ((layers, *shape), axes)
    assert found == expected
    biases = nnx.to_pure_dict(nnx.state(make_model(), RouterBias))
    assert jax.tree.map(jnp.shape, biases) == {
        "moe_blocks": {"ffn": {"router": {"bias": (2, E)}}},
        "mtp": {"block": {"ffn": {"router": {"bias": (2, E)}}}},
    }


def test_groups_without_layers_are_absent():
    config = dataclasses.replace(CONFIG, num_dense_layers=0, mtp_depth=0, q_latent_dim=None)
    model = make_model(config)
    groups = {name.split(".")[0] for name in shapes_and_axes(model)}
    assert groups == {"embed", "moe_blocks", "final_norm", "head"}
    _, mtp, stats = jax.eval_shape(model.hidden_states, random_tokens())
    assert mtp == [] and stats.counts_E.shape == (3, 8)
    all_dense = make_model(dataclasses.replace(config, num_layers=2, num_dense_layers=2))
    assert jax.eval_shape(all_dense.hidden_states, random_tokens())[2] is None


def test_initial_weights():
    config = dataclasses.replace(CONFIG, num_layers=2, num_dense_layers=0, init_std=0.006)

    @jax.jit
    def initial():
        model = DeepSeekV3(config, runtime=Runtime(), rngs=nnx.Rngs(1))
        return nnx.split(model, nnx.Param, RouterBias)[1:]

    params, router_bias = map(nnx.to_pure_dict, initial())
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.dtype == jnp.float32
        if path[-1].key == "gain":
            np.testing.assert_array_equal(x, np.ones_like(x), err_msg=str(path))
        else:
            bound = 5 / np.sqrt(x.size)  # five standard errors of a mean of N(0, 1)
            assert abs(float(x.mean()) / 0.006) < bound, path
            assert abs(float(x.std()) / 0.006 - 1) < bound, path
    layers = params["moe_blocks"]["attn"]["wo"]["kernel"]
    assert not np.allclose(layers[0], layers[1])
    for bias in jax.tree.leaves(router_bias):
        np.testing.assert_array_equal(bias, np.zeros_like(bias))


def layer_of(blocks, index):
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[index], state))


def test_scan_runs_the_blocks_in_order_and_logits_are_the_head_of_the_final_norm():
    model, tokens = make_model(), random_tokens()
    main, _, stats = hidden_states(*nnx.split(model), tokens)
    graphdef, state = nnx.split(model)

    @jax.jit
    def unrolled(state):
        model = nnx.merge(graphdef, state)
        x, counts = model.embed(tokens), []
        cos_sin = rope.cos_sin(rope.positions(T), CONFIG)
        for blocks, index in (
            (model.dense_blocks, 0),
            (model.moe_blocks, 0),
            (model.moe_blocks, 1),
        ):
            block = layer_of(blocks, index)
            x = x + block.attn(block.norm_a(x), cos_sin=cos_sin)
            y = block.ffn(block.norm_f(x))
            if blocks is model.moe_blocks:
                y, layer_stats = y
                counts.append(layer_stats.counts_E)
            x = x + y
        return model.final_norm(x), jnp.stack(counts)

    expected, counts = unrolled(state)
    np.testing.assert_allclose(main, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats.counts_E[: len(counts)], counts)
    logits = model(tokens)
    assert logits.dtype == jnp.float32
    head, main = np.asarray(model.head.kernel[...], np.float64), np.asarray(main, np.float64)
    np.testing.assert_allclose(logits, main @ head, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "paper"])
def test_layers_compiled_one_by_one_are_the_same(remat):
    tokens_BT = random_tokens()

    @functools.partial(jax.jit, static_argnums=0)
    def both(graphdef, state):
        def of(state):
            hidden_BTD, mtp, _ = nnx.merge(graphdef, state).hidden_states(tokens_BT)
            return sum(jnp.sum(h * h) for h in (hidden_BTD, *mtp))

        return jax.value_and_grad(of)(state)

    found = [
        both(*nnx.split(make_model(scan_layers=scan_layers, remat=remat)))
        for scan_layers in (True, False)
    ]
    chex.assert_trees_all_close(*found, rtol=2e-5, atol=2e-5)


def test_a_packed_document_sees_itself_alone():
    graphdef, state = nnx.split(make_model())
    tokens = random_tokens(3)
    segments = np.array([[1] * 5 + [2] * 5 + [0], [1] * 5 + [0] + [2] * 5], np.int32)
    main, mtp, stats = hidden_states(graphdef, state, tokens, segments)
    documents = [(row, np.flatnonzero(segments[row] == d)) for row in range(B) for d in (1, 2)]
    alone = np.stack([tokens[row, where] for row, where in documents])
    main_alone, mtp_alone, stats_alone = hidden_states(graphdef, state, alone)
    for i, (row, where) in enumerate(documents):
        np.testing.assert_allclose(main[row, where], main_alone[i], atol=2e-5)
        for k in (1, 2):
            got, expected = mtp[k - 1][row, where[:-k]], mtp_alone[k - 1][i, :-k]
            np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(stats.counts_E, stats_alone.counts_E)


@functools.partial(jax.jit, static_argnums=0)
def run_block(graphdef, state, x_BTD):
    cos_sin = rope.cos_sin(rope.positions(x_BTD.shape[1]), CONFIG)
    return nnx.merge(graphdef, state)(x_BTD, cos_sin=cos_sin)


@pytest.mark.parametrize("state_fed", ["post_norm", "pre_norm"])
def test_mtp_equals_the_unpadded_formula(state_fed):
    """h'_{1:T-k} formed position by position, then the block at length T - k (spec §4)."""
    config = dataclasses.replace(CONFIG, mtp_hidden=state_fed)
    model, tokens = make_model(config), random_tokens(4)
    main, mtp, stats = hidden_states(*nnx.split(model), tokens)
    table = np.asarray(model.embed.table[...])
    if state_fed == "post_norm":
        hidden = np.asarray(main)
    else:  # undo the final norm: the state is known up to the rms that the next norm removes
        hidden = np.asarray(main / model.final_norm.gain[...])
    for k in (1, 2):
        module = layer_of(model.mtp, k - 1)
        eps = config.norm_epsilon

        def norm(x, gain, eps=eps):
            return x / np.sqrt((x**2).mean() + eps) * np.asarray(gain[...])

        joined = np.zeros((B, T - k, 2 * config.width), np.float32)
        for b in range(B):
            for i in range(T - k):
                embedding = table[tokens[b, i + k]]
                joined[b, i, : config.width] = norm(embedding, module.enorm.gain)
                joined[b, i, config.width :] = norm(hidden[b, i], module.hnorm.gain)
        x = joined @ np.asarray(module.proj.kernel[...])
        h, expected_stats = run_block(*nnx.split(module.block), x)
        expected = np.asarray(module.out_norm(h))
        np.testing.assert_allclose(mtp[k - 1][:, : T - k], expected, atol=1e-4)
        layer = config.num_moe_layers + k - 1
        got_stats = jax.tree.map(lambda s, layer=layer: s[layer], stats)
        np.testing.assert_array_equal(got_stats.counts_E, expected_stats.counts_E)
        chex.assert_trees_all_close(got_stats, expected_stats, rtol=1e-4)
        hidden = expected if state_fed == "post_norm" else np.asarray(h)


def test_bfloat16_compute_keeps_float32_masters():
    config = dataclasses.replace(CONFIG, num_layers=1, num_dense_layers=0, mtp_depth=1)
    tokens = random_tokens(7)
    low = make_model(config, compute_dtype=jnp.dtype("bfloat16"))
    graphdef, params, rest = nnx.split(low, nnx.Param, RouterBias)

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graphdef, params, rest)
            main, mtp, stats = model.hidden_states(tokens)
            logits = model.logits(main)
            return logits.mean(), (main, mtp[0], logits, stats)

        return jax.grad(loss, has_aux=True)(params)

    gradients, (main, mtp, logits, stats) = run(params)
    assert main.dtype == mtp.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((gradients, stats))} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16))  # not rounded on the way
    exact = make_model(config)(tokens)
    assert np.abs(logits - exact).mean() < 0.1 * np.abs(exact).mean()


def inner_programs(equation):
    for value in equation.params.values():
        for inner in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield inner


def equations(program):
    for equation in program.eqns:
        yield equation
        for inner in inner_programs(equation):
            yield from equations(inner)


def count_attention_loops(program):
    """Loops over key blocks: the `while` equations that take an exponential."""
    loops = [e for e in equations(program) if e.primitive.name == "while"]
    bodies = [[e for inner in inner_programs(loop) for e in equations(inner)] for loop in loops]
    return sum(any(e.primitive.name == "exp" for e in body) for body in bodies)


def count_matmuls(program, *widths):
    """How often a product of shape [B, T, width] is formed."""
    shapes = [
        e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == "dot_general"
    ]
    return tuple(shapes.count((B, T, width)) for width in widths)


@pytest.mark.slow
def test_gradients_of_mtp_under_every_recomputation_policy():
    """One test, so that its programs compile once. The loss is the MTP module's alone."""
    config = dataclasses.replace(
        CONFIG, num_layers=2, num_dense_layers=0, mtp_depth=1, kv_latent_dim=14, expert_ffn_width=22
    )
    tokens = random_tokens(8)
    weights = np.random.default_rng(9).standard_normal((B, T - 1, 32)).astype(np.float32)
    num_bytes, loops, matmuls, gradients = {}, {}, {}, {}
    for policy in ("none", "paper", "full"):
        model = make_model(config, remat=policy)
        graphdef, params, rest = nnx.split(model, nnx.Param, RouterBias)

        def loss(params, graphdef=graphdef, rest=rest):
            _, (h_BTD,), _ = nnx.merge(graphdef, params, rest).hidden_states(tokens)
            return jnp.sum(h_BTD[:, : T - 1] * weights)

        kept = jax.eval_shape(lambda p, loss=loss: jax.vjp(loss, p)[1], params)
        num_bytes[policy] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
        traced = jax.jit(jax.grad(loss)).trace(params)
        loops[policy] = count_attention_loops(traced.jaxpr.jaxpr)
        # The outputs of wkv_a, the shared w13, wq_b and wkv_b.
        matmuls[policy] = count_matmuls(
            traced.jaxpr.jaxpr, 14 + 4, 2 * 22, 2 * (8 + 4), 2 * (8 + 6)
        )
        gradients[policy] = nnx.to_pure_dict(traced.lower().compile()(params))

    assert num_bytes["full"] < num_bytes["paper"] < 0.8 * num_bytes["none"], num_bytes
    # Two programs hold a block, the scan's and the module's. Only 'full' runs the attention forward
    # and the down-projections again; 'paper' the up-projections (spec §5.5).
    assert loops == {"none": 4, "paper": 4, "full": 6}
    assert matmuls == {"none": (2, 2, 2, 2), "paper": (2, 2, 4, 4), "full": (4, 4, 4, 4)}
    expected = jax.tree_util.tree_leaves_with_path(gradients["none"])
    for policy in ("paper", "full"):
        got = jax.tree.leaves(gradients[policy])
        for (path, want), x in zip(expected, got, strict=True):
            tolerance = 1e-6 * np.abs(want).max()
            np.testing.assert_allclose(x, want, atol=tolerance, err_msg=f"{policy} {path}")
    # No gradient is stopped (spec §4, trap 5): everything but the head, which is not in the loss.
    for path, x in expected:
        for layer in x if path[0].key in ("moe_blocks", "mtp") else x[None]:
            reached = float(jnp.abs(layer).max()) > 1e-6
            assert reached == (path[0].key != "head"), path
    # Position i reads the embeddings of tokens 1 .. i + 1, so the last token counts too.
    touched = np.flatnonzero(np.abs(gradients["none"]["embed"]["table"]).max(-1))
    assert set(touched) == set(tokens.ravel())

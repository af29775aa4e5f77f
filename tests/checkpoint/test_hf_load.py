"""Hugging Face folders as models: goldens, FP8 in memory, meshes, and what each process reads."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from absl import logging
from checkpoint import hf_random
from flax import nnx
from golden import cases
from golden.weights import nested
from jax.sharding import Mesh

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.hf_folder import StoredTensor
from dsv3_jax.checkpoint.hf_load import load_folder
from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.precision.block_scaled import BlockScaled, dequantize_on_host

FP8 = jnp.float8_e4m3fn
TOKENS_BT = np.random.default_rng(5).integers(0, 64, (8, 11))


def make_mesh():
    return Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))


def released_config(model):
    """config.json of a golden case, its keys typed out."""
    v3, yarn = model.affinity == "sigmoid", model.yarn
    scaling = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale,
    }
    grouped = "group_limited_greedy" if model.num_groups > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": model.dense_ffn_width,
        "moe_intermediate_size": model.expert_ffn_width,
        "num_hidden_layers": model.num_layers,
        "first_k_dense_replace": model.num_dense_layers,
        "num_nextn_predict_layers": model.mtp_depth,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "qk_rope_head_dim": model.qk_rope_head_dim,
        "v_head_dim": model.v_head_dim,
        "q_lora_rank": model.q_latent_dim,
        "kv_lora_rank": model.kv_latent_dim,
        "n_routed_experts": model.num_experts,
        "n_shared_experts": model.num_shared_experts,
        "num_experts_per_tok": model.experts_per_token,
        "n_group": model.num_groups,
        "topk_group": model.num_groups_kept,
        "scoring_func": model.affinity,
        "topk_method": "noaux_tc" if v3 else grouped,
        "norm_topk_prob": model.normalize_weights,
        "routed_scaling_factor": model.routed_scaling_factor,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if yarn.enabled else None,
        "max_position_embeddings": 4096,
        "mtp_hidden": model.mtp_hidden,
    }


def released_tensors(model, tree):
    """The weights of a golden case under the released names, typed out; linears turned over."""
    found = {
        "model.embed_tokens.weight": tree["embed.table"],
        "model.norm.weight": tree["final_norm.gain"],
        "lm_head.weight": tree["head.kernel"].T,
    }
    dense = model.num_dense_layers
    for layer in range(model.num_layers + model.mtp_depth):
        name = f"model.layers.{layer}."
        if layer < dense:
            group, at = "dense_blocks.", layer
        elif layer < model.num_layers:
            group, at = "moe_blocks.", layer - dense
        else:
            group, at = "mtp.block.", layer - model.num_layers
            found[name + "enorm.weight"] = tree["mtp.enorm.gain"][at]
            found[name + "hnorm.weight"] = tree["mtp.hnorm.gain"][at]
            found[name + "eh_proj.weight"] = tree["mtp.proj.kernel"][at].T
            found[name + "shared_head.norm.weight"] = tree["mtp.out_norm.gain"][at]
            found[name + "embed_tokens.weight"] = tree["embed.table"]
            found[name + "shared_head.head.weight"] = tree["head.kernel"].T
        found[name + "input_layernorm.weight"] = tree[group + "norm_a.gain"][at]
        found[name + "post_attention_layernorm.weight"] = tree[group + "norm_f.gain"][at]
        for theirs, ours in (
            ("q_proj", "wq.kernel"),
            ("q_a_proj", "wq_a.kernel"),
            ("q_b_proj", "wq_b.kernel"),
            ("kv_a_proj_with_mqa", "wkv_a.kernel"),
            ("kv_b_proj", "wkv_b.kernel"),
            ("o_proj", "wo.kernel"),
            ("q_a_layernorm", "q_norm.gain"),
            ("kv_a_layernorm", "kv_norm.gain"),
        ):
            if f"{group}attn.{ours}" in tree:
                found[f"{name}self_attn.{theirs}.weight"] = tree[f"{group}attn.{ours}"][at].T

        def feed_forward(prefix, w13, w2, name=name):
            half = w13.shape[1] // 2
            found[f"{name}{prefix}.gate_proj.weight"] = w13[:, :half].T
            found[f"{name}{prefix}.up_proj.weight"] = w13[:, half:].T
            found[f"{name}{prefix}.down_proj.weight"] = w2.T

        if layer < dense:
            both = (tree[group + "ffn.w13.kernel"][at], tree[group + "ffn.w2.kernel"][at])
            feed_forward("mlp", *both)
            continue
        found[name + "mlp.gate.weight"] = tree[group + "ffn.router.kernel"][at].T
        if model.affinity == "sigmoid":
            bias = tree[group + "ffn.router.bias"][at]
            found[name + "mlp.gate.e_score_correction_bias"] = bias
        for expert in range(model.num_experts):
            w13 = tree[group + "ffn.experts.w13"][at, expert]
            feed_forward(f"mlp.experts.{expert}", w13, tree[group + "ffn.experts.w2"][at, expert])
        shared = (tree[group + f"ffn.shared.{part}.kernel"][at] for part in ("w13", "w2"))
        feed_forward("mlp.shared_experts", *shared)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def write_golden(path, case):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(released_config(case.model)))
    tensors = released_tensors(case.model, case.weights())
    safetensors.numpy.save_file(tensors, path / "model.safetensors")


@jax.jit(static_argnums=0)
def _all_logits(graphdef, state, tokens_BT):
    model = nnx.merge(graphdef, state)
    main_BTD, mtp_hidden, _ = model.hidden_states(tokens_BT)
    return [model.logits(hidden) for hidden in (main_BTD, *mtp_hidden)]


def all_logits(model, tokens_BT):
    """Of the main model and of every MTP depth."""
    return list(map(np.asarray, _all_logits(*nnx.split(model), tokens_BT)))


def assert_golden(model, case, name, copies):
    golden = np.load(cases.FOLDER / f"{name}.npz")
    tokens_BT = np.tile(case.tokens()[:, :-1], (copies, 1))
    for depth, logits in enumerate(all_logits(model, tokens_BT)):
        wanted = golden[f"mtp_logits_{depth}" if depth else "logits"]
        ours = logits[:, : wanted.shape[1]].reshape(copies, *wanted.shape)
        assert np.abs(ours - wanted).max() <= 2e-5 * np.abs(wanted).max(), depth


@pytest.mark.parametrize("name", cases.CASES)
def test_logits_equal_the_golden(name, tmp_path):
    case = cases.CASES[name]
    write_golden(tmp_path / "hf", case)
    model = DeepSeekV3.from_pretrained(tmp_path / "hf")
    assert model.config.mtp_depth == case.model.mtp_depth
    assert_golden(model, case, name, 1)
    if name in ("query_latent", "softmax_groups"):
        assert_golden(DeepSeekV3.from_pretrained(tmp_path / "hf", mesh=make_mesh()), case, name, 4)


@pytest.fixture(scope="module")
def fp8_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("load") / "fp8"
    return path, hf_random.write_random_folder(path, recoverable=False, seed=3)


def dequantized(tensors):
    """The folder's weights as float32 under the same names, the scales gone."""
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.astype(np.float32)
        if name + "_scale_inv" in tensors:
            wide = np.kron(tensors[name + "_scale_inv"], np.ones((128, 128), np.float32))
            found[name] *= wide[: tensor.shape[0], : tensor.shape[1]]
    return {name: found[name] for name in found if not name.endswith("_scale_inv")}


def stored_view(model, leaves):
    """What `released_tensors` makes of a model's own leaves."""
    tree = {".".join(path): np.asarray(leaf[...].astype(jnp.float32)) for path, leaf in leaves}
    return released_tensors(model.config, tree)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (jnp.float32, None),
        (jnp.float32, "fsdp_ep"),
        (jnp.bfloat16, "zero1_ep"),
        (FP8, None),
        (FP8, "fsdp_ep"),
    ],
)
def test_every_weight_is_the_stored_one(fp8_folder, dtype, layout):
    path, tensors = fp8_folder
    mesh = make_mesh() if layout else None
    model = load_folder(path, dtype, mesh, layout or "zero1_ep")
    found = stored_view(model, nnx.to_flat_state(nnx.state(model)))
    expected = dequantized(tensors)
    assert set(found) == set(expected)
    for name, value in expected.items():
        rounded = jnp.bfloat16 if dtype == jnp.bfloat16 and "bias" not in name else jnp.float32
        np.testing.assert_array_equal(found[name], value.astype(rounded), name)
    experts = model.moe_blocks.ffn.experts.w13[...]
    if layout:
        codes = experts.codes if dtype == FP8 else experts
        assert codes.sharding.spec[1] == "expert"
        assert codes.addressable_shards[0].data.shape[1] == 2


def quantized(w_NK):
    """Codes and scales of a matrix of one block, by numpy."""
    scale = np.float32(np.abs(w_NK).max()) / np.float32(448)
    return (w_NK / scale).astype(hf_random.FP8), np.full((1, 1), scale, np.float32)


def test_logits_of_fp8_weights_are_those_of_the_dequantized_ones(tmp_path):
    """A golden case in FP8; the oracle's tree is dequantised leaf by leaf in numpy."""
    case = cases.CASES["query_latent"]
    tree, tensors = case.weights(), {}
    for name, value in released_tensors(case.model, tree).items():
        if "_proj" in name and "eh_proj" not in name:
            value, tensors[name + "_scale_inv"] = quantized(value)
        tensors[name] = value
    (tmp_path / "config.json").write_text(json.dumps(released_config(case.model)))
    hf_random.write_safetensors(tmp_path / "model.safetensors", tensors)
    for path, leaf in tree.items():
        if not any(part in path for part in ("attn.w", "ffn.w", "experts.", "shared.")):
            continue
        halves = [slice(0, None)]
        if "w13" in path:
            halves = [slice(0, leaf.shape[-1] // 2), slice(leaf.shape[-1] // 2, None)]
        for index in np.ndindex(leaf.shape[:-2]):
            for half in halves:
                codes, scale = quantized(leaf[index][:, half])
                leaf[index][:, half] = codes.astype(np.float32) * scale
    oracle = nnx.eval_shape(lambda: DeepSeekV3(case.model, runtime=Runtime(), rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(oracle)
    nnx.replace_by_pure_dict(state, nested(tree))
    tokens = case.tokens()
    wanted = all_logits(nnx.merge(graphdef, state), tokens)
    golden = np.load(cases.FOLDER / "query_latent.npz")["logits"]
    assert np.abs(wanted[0][:, :-1] - golden).max() > 1e-3 * np.abs(golden).max()
    loaded = DeepSeekV3.from_pretrained(tmp_path)
    for ours, expected in zip(all_logits(loaded, tokens), wanted, strict=True):
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("on_mesh", [pytest.param(False, marks=pytest.mark.slow), True])
def test_fp8_in_memory_computes_what_the_bfloat16_import_computes(fp8_folder, on_mesh):
    mesh = make_mesh() if on_mesh else None
    kept = DeepSeekV3.from_pretrained(fp8_folder[0], dtype=FP8, mesh=mesh)
    cast = DeepSeekV3.from_pretrained(fp8_folder[0], dtype=jnp.bfloat16, mesh=mesh)
    for ours, expected in zip(*(all_logits(m, TOKENS_BT) for m in (kept, cast)), strict=True):
        np.testing.assert_array_equal(ours, expected)
    if not on_mesh:  # the absorbed form and the cache
        both = [np.asarray(m.generate(TOKENS_BT[:2], 5)) for m in (kept, cast)]
        np.testing.assert_array_equal(*both)


def test_fp8_in_memory_takes_one_byte_a_weight(fp8_folder):
    path, tensors = fp8_folder
    model = DeepSeekV3.from_pretrained(path, dtype=FP8)
    leaves = [leaf[...] for _, leaf in nnx.to_flat_state(nnx.state(model))]
    scaled = [leaf for leaf in leaves if isinstance(leaf, BlockScaled)]
    stored = [tensor for tensor in tensors.values() if tensor.dtype == hf_random.FP8]
    assert {leaf.codes.dtype for leaf in scaled} == {jnp.dtype(FP8)}
    assert sum(leaf.codes.nbytes for leaf in scaled) == sum(tensor.size for tensor in stored)
    others = {leaf.dtype.name for leaf in leaves if not isinstance(leaf, BlockScaled)}
    assert others == {"bfloat16", "float32"}  # float32: the router bias
    assert model.moe_blocks.ffn.router.bias[...].dtype == jnp.float32


def test_fp8_in_memory_refuses_gradients(fp8_folder):
    model = DeepSeekV3.from_pretrained(fp8_folder[0], dtype=FP8)
    graphdef, state = nnx.split(model)
    with pytest.raises(UserError, match="do not train"):
        jax.grad(lambda state: nnx.merge(graphdef, state)(TOKENS_BT).sum())(state)


def test_every_byte_is_read_once(fp8_folder, monkeypatch):
    """On a mesh whose `data` axis holds every weight twice; no fragment is read with its row."""
    path, tensors = fp8_folder
    done, read = {}, StoredTensor.read

    def counting(self, *ranges):
        part = read(self, *ranges)
        done[self.name] = done.get(self.name, 0) + part.nbytes
        return part

    monkeypatch.setattr(StoredTensor, "read", counting)
    load_folder(path, jnp.float32, make_mesh())
    compared = {"model.embed_tokens.weight", "lm_head.weight"}  # with MTP's copies, before
    assert done == {n: t.nbytes * (1 + (n in compared)) for n, t in tensors.items()}


def warnings_of(monkeypatch, function):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: found.append(text % args))
    return function(), found


def rewrite(path, change, **arguments):
    """A random folder in one file, its tensors changed by `change(tensors)`."""
    tensors = hf_random.write_random_folder(path, num_shards=1, dtype="bf16", **arguments)
    change(tensors)
    hf_random.write_safetensors(path / "model.safetensors", tensors)
    return tensors


COPIES = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")


def test_mtp_copies_are_compared_and_dropped(tmp_path, monkeypatch):
    def differ(tensors):
        tensors[COPIES[1]] = tensors[COPIES[1]].copy()
        tensors[COPIES[1]][63, 159] += 1

    rewrite(tmp_path / "same", lambda tensors: None)
    rewrite(tmp_path / "absent", lambda tensors: [tensors.pop(name) for name in COPIES])
    rewrite(tmp_path / "other", differ)
    for name, count in (("same", 0), ("absent", 0), ("other", 1)):
        model, found = warnings_of(
            monkeypatch, lambda name=name: DeepSeekV3.from_pretrained(tmp_path / name)
        )
        assert model.config.mtp_depth == 1 and len(found) == count, found
    assert f"{COPIES[1]} differs from lm_head.weight" in found[0]


def test_a_folder_without_the_mtp_layer_it_announces(tmp_path, monkeypatch):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    rewrite(tmp_path / "hf", drop)
    model, found = warnings_of(monkeypatch, lambda: DeepSeekV3.from_pretrained(tmp_path / "hf"))
    assert model.config.mtp_depth == 0 and model.mtp is None
    assert len(found) == 1 and "mtp_depth=0" in found[0]


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    def nothing_is_read(*_):
        raise AssertionError("a weight was read")

    rewrite(tmp_path / "hf", lambda tensors: None)
    monkeypatch.setattr(StoredTensor, "read", nothing_is_read)
    with pytest.raises(UserError, match="convert it first"):
        DeepSeekV3.from_pretrained(tmp_path / "hf", dtype=FP8)
    for dtype in (jnp.float16, "float23"):
        with pytest.raises(UserError, match="allowed: float32, bfloat16, float8_e4m3fn"):
            DeepSeekV3.from_pretrained(tmp_path / "hf", dtype=dtype)
    mesh = Mesh(np.array(jax.devices()[:3]).reshape(1, 1, 3), ("pipe", "data", "expert"))
    with pytest.raises(UserError, match="make its axis 'expert' divide 8"):
        DeepSeekV3.from_pretrained(tmp_path / "hf", mesh=mesh)
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    with pytest.raises(UserError, match="the mesh has the axes model;"):
        DeepSeekV3.from_pretrained(tmp_path / "hf", mesh=mesh)
    rewrite(tmp_path / "cut", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(UserError, match="model.norm.weight"):
        DeepSeekV3.from_pretrained(tmp_path / "cut")


def test_the_tokenizer_of_a_folder(tmp_path):
    rewrite(tmp_path / "hf", lambda tensors: None)
    with pytest.raises(UserError, match="no tokenizer.json"):
        load_run_tokenizer(tmp_path / "hf")
    train_tokenizer(["def f(x):\n    return x\n"] * 9, 290).save(tmp_path / "hf/tokenizer.json")
    tokenizer = load_run_tokenizer(tmp_path / "hf")
    assert tokenizer.decode(tokenizer.encode("def g(y):")) == "def g(y):"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_part_of_a_matrix_is_dequantized_alike(dtype):
    rng = np.random.default_rng(8)
    codes, scales = hf_random.random_codes(rng, (300, 410), recoverable=False)
    wide = np.kron(scales, np.ones((128, 128), np.float32))[:300, :410]
    whole = (codes.astype(np.float32) * wide).astype(dtype)
    kept = BlockScaled(jnp.asarray(codes), jnp.asarray(scales)).astype(dtype)
    np.testing.assert_array_equal(kept, whole)
    for _ in range(20):
        (a, b), (c, d) = np.sort(rng.integers(0, 300, 2)), np.sort(rng.integers(0, 410, 2))
        part = dequantize_on_host(codes[a:b, c:d], scales, np.dtype(dtype), a, c)
        np.testing.assert_array_equal(part, whole[a:b, c:d])

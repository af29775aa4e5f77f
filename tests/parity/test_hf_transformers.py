"""Exports loaded by transformers itself, live: needs torch and transformers beside jax."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from golden import cases
from parity.test_goldens import relative_difference, with_weights

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.hf_folder import open_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from golden import transformers_check  # noqa: E402


def load_theirs(folder, dtype="float32"):
    """Their model from a folder of ours, and what it missed or did not expect there."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    return model.eval(), report


def their_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("name", cases.CASES)
def test_transformers_loads_an_export_and_computes_the_same(name, dtype, tmp_path):
    case = cases.CASES[name]
    with_weights(case).save_pretrained(tmp_path / "out", dtype=dtype)
    theirs, report = load_theirs(tmp_path / "out")
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    mtp = tuple(f"model.layers.{case.model.num_layers + k}." for k in range(case.model.mtp_depth))
    # Their V3 models leave the MTP layer out, on purpose.
    assert all(key.startswith(mtp) for key in report["unexpected_keys"]), report

    tokens = case.tokens()[:, :-1]
    ours = np.asarray(DeepSeekV3.from_pretrained(tmp_path / "out", dtype=jnp.float32)(tokens))
    assert relative_difference(ours, their_logits(theirs, tokens)) < 2e-5
    if dtype == "f32":
        golden = np.load(cases.FOLDER / f"{name}.npz")["logits"]
        assert relative_difference(their_logits(theirs, tokens), golden) < 2e-5


@pytest.mark.parametrize("name", ["query_latent", "yarn", "softmax_groups"])
def test_what_transformers_saves_loads_here_and_computes_the_same(name, tmp_path):
    case = cases.CASES[name]
    theirs = transformers_check.make_network(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = DeepSeekV3.from_pretrained(tmp_path / "theirs", dtype=jnp.float32)
    assert ours.config == dataclasses.replace(
        case.model, mtp_depth=0, yarn=ours.config.yarn, init_std=ours.config.init_std
    )
    tokens = case.tokens()[:, :-1]
    logits = np.asarray(ours(tokens))
    assert relative_difference(logits, their_logits(theirs, tokens)) < 2e-5


def test_fp8_export_stands_for_the_weights(tmp_path):
    """Their FP8 layers need a GPU; the numbers do not: torch dequantises the folder."""
    model = dataclasses.replace(
        cases.BASE, width=160, kv_latent_dim=130, expert_ffn_width=96, dense_ffn_width=256
    )
    case = cases.Case(model=model, seed=3, bias_range=(-0.3, 0.3))
    with_weights(case).save_pretrained(tmp_path / "fp8", dtype="fp8")
    with_weights(case).save_pretrained(tmp_path / "f32", dtype="f32")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "fp8")
    assert config.quantization_config["quant_method"] == "fp8"
    assert config.quantization_config["weight_block_size"] == [128, 128]

    quantized, exact = (open_folder(tmp_path / d).tensors for d in ("fp8", "f32"))
    checked = 0
    for name, tensor in quantized.items():
        if tensor.dtype != "F8_E4M3":
            continue
        codes = torch.tensor(tensor.read().view(np.uint8)).view(torch.float8_e4m3fn)
        scales = torch.tensor(quantized[f"{name}_scale_inv"].read())
        wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        wide = wide[: codes.shape[0], : codes.shape[1]]
        weight = torch.tensor(exact[name].read())
        # Half a step of E4M3: 2^-4 of the number, 2^-10 of the scale below the normal range.
        allowed = torch.maximum(weight.abs() * 2**-4, wide * 2**-10) * 1.001
        assert ((codes.float() * wide - weight).abs() <= allowed).all(), name
        assert codes.float().abs().amax() == 448, name
        checked += 1
    moe_layers = model.num_moe_layers + model.mtp_depth
    attention = 5 * (model.num_layers + model.mtp_depth)
    assert checked == attention + 3 * model.num_dense_layers + 3 * 9 * moe_layers

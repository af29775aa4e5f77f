"""Folders that do not fit their config.json: every kind of misfit is one line with a name."""

import logging
import re
from dataclasses import replace

import numpy as np
import pytest
from checkpoint.hf_random import ALIGNED, RAGGED, V2_LITE, write_random_folder

from dsv3_jax.checkpoint.hf_check import check_tensors, without_absent_mtp
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.errors import UserError


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """An FP8 folder and its model."""
    path = tmp_path_factory.mktemp("hf") / "fp8"
    write_random_folder(path, values=RAGGED, dtype="fp8")
    folder = open_folder(path)
    return folder, read_model_config(folder.config, "config.json")


def refused(folder, tensors, model):
    with pytest.raises(UserError) as error:
        check_tensors(replace(folder, tensors=tensors), model)
    text = str(error.value)
    assert "\n" not in text and len(text) < 900
    assert str(folder.path) in text
    return text


@pytest.mark.parametrize("values", [RAGGED, ALIGNED, V2_LITE], ids=["ragged", "aligned", "v2"])
@pytest.mark.parametrize("dtype", ["fp8", "bf16", "f32"])
def test_a_whole_folder_passes(tmp_path, values, dtype):
    write_random_folder(tmp_path / "a", values=values, dtype=dtype)
    folder = open_folder(tmp_path / "a")
    model = read_model_config(folder.config, "config.json")
    check_tensors(folder, model)
    assert without_absent_mtp(folder, model) == model


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
UP = "model.layers.2.mlp.experts.5.up_proj.weight"
BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("name", [O_PROJ, UP, BIAS, NORM, "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor(opened, name):
    folder, model = opened
    rest = {n: t for n, t in folder.tensors.items() if not n.startswith(name)}
    assert f"lacks {name};" in refused(folder, rest, model)


def test_a_missing_scale(opened):
    folder, model = opened
    rest = {n: t for n, t in folder.tensors.items() if n != f"{UP}_scale_inv"}
    assert f"{UP} is FP8 but has no scale_inv" in refused(folder, rest, model)


def test_an_unknown_name_and_what_it_may_mean(opened):
    folder, model = opened
    wrong = UP.replace("up_proj", "upproj")
    tensors = {wrong if n == UP else n: t for n, t in folder.tensors.items()}
    text = refused(folder, tensors, model)
    assert f"lacks {UP}" in text and f"unknown {wrong} (did you mean '{UP}'?)" in text
    assert "unknown model.extra;" in refused(
        folder, folder.tensors | {"model.extra": folder.tensors[NORM]}, model
    )


def test_more_layers_or_experts_than_config_json_says(opened):
    folder, model = opened
    text = refused(folder, folder.tensors, replace(model, num_experts=4))
    assert "unknown model.layers.1.mlp.experts.4.gate_proj.weight" in text
    assert re.search(r"and \d+ more", text)
    assert "lacks" in refused(folder, folder.tensors, replace(model, num_experts=12))
    assert "lacks model.layers.4." in refused(folder, folder.tensors, replace(model, mtp_depth=2))
    assert "unknown model.layers.3." in refused(folder, folder.tensors, replace(model, mtp_depth=0))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (O_PROJ, (160, 81), "160 x 81 instead of 160 x 80"),
        (O_PROJ, (80, 160), "80 x 160 instead of 160 x 80"),
        (f"{O_PROJ}_scale_inv", (1, 1), "1 x 1 instead of 2 x 1"),
        (BIAS, (8, 1), "8 x 1 instead of 8"),
        (NORM, (), "a scalar instead of 160"),
    ],
)
def test_a_wrong_shape(opened, name, shape, message):
    folder, model = opened
    tensors = folder.tensors | {name: replace(folder.tensors[name], shape=shape)}
    assert f"{name} is {message}" in refused(folder, tensors, model)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (O_PROJ, "F8_E5M2", "F8_E5M2 instead of F8_E4M3 or BF16 or F16 or F32"),
        (O_PROJ, "I8", "I8 instead of F8_E4M3"),
        (f"{O_PROJ}_scale_inv", "BF16", "BF16 instead of F32"),
        (NORM, "F8_E4M3", "F8_E4M3 instead of BF16 or F16 or F32"),
        ("model.layers.3.eh_proj.weight", "F8_E4M3", "F8_E4M3 instead of BF16"),
        (BIAS, "I32", "I32 instead of BF16 or F16 or F32"),
    ],
)
def test_a_wrong_dtype(opened, name, dtype, message):
    folder, model = opened
    tensors = folder.tensors | {name: replace(folder.tensors[name], dtype=dtype)}
    assert f"{name} is {message}" in refused(folder, tensors, model)


def test_a_projection_is_quantised_with_its_scales_or_not_at_all(opened):
    folder, model = opened
    tensors = folder.tensors | {UP: replace(folder.tensors[UP], dtype="BF16")}
    text = refused(folder, tensors, model)
    assert f"{UP}_scale_inv belongs to a weight of dtype BF16" in text
    del tensors[f"{UP}_scale_inv"]
    check_tensors(replace(folder, tensors=tensors), model)
    for dtype in ("F16", "F32"):
        tensors[NORM] = replace(tensors[NORM], dtype=dtype)
        check_tensors(replace(folder, tensors=tensors), model)


def test_copies_and_rotary_buffers_do_not_matter(opened):
    folder, model = opened
    tensors = dict(folder.tensors)
    del tensors["model.layers.3.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[NORM]
    check_tensors(replace(folder, tensors=tensors), model)
    del tensors["model.layers.3.shared_head.head.weight"]
    check_tensors(replace(folder, tensors=tensors), model)
    del tensors["model.layers.3.shared_head.norm.weight"]  # MTP's own
    assert "lacks model.layers.3.shared_head.norm.weight" in refused(folder, tensors, model)


def test_mtp_modules_are_absent_altogether_or_an_error(opened):
    folder, model = opened
    main = {n: t for n, t in folder.tensors.items() if not n.startswith("model.layers.3.")}
    without = without_absent_mtp(replace(folder, tensors=main), model)
    assert without == replace(model, mtp_depth=0)
    check_tensors(replace(folder, tensors=main), without)
    name = "model.layers.3.hnorm.weight"
    partly = replace(folder, tensors=main | {name: folder.tensors[name]})
    assert without_absent_mtp(partly, model) == model
    assert "lacks model.layers.3." in refused(folder, partly.tensors, model)


def test_a_bfloat16_bias_is_accepted_with_a_warning(opened, caplog):
    folder, model = opened
    with caplog.at_level(logging.WARNING):
        check_tensors(folder, model)
        assert not caplog.records
        tensors = folder.tensors | {BIAS: replace(folder.tensors[BIAS], dtype="BF16")}
        check_tensors(replace(folder, tensors=tensors), model)
    assert len(caplog.records) == 1 and BIAS in caplog.text


def test_several_problems_are_told_at_once(opened):
    folder, model = opened
    rng = np.random.default_rng(5)
    tensors = dict(folder.tensors)
    experts = [n for n in tensors if ".experts." in n and n.endswith("weight")]
    lost = set(rng.permutation(experts)[:7])
    tensors = {n: t for n, t in tensors.items() if n.removesuffix("_scale_inv") not in lost}
    tensors[O_PROJ] = replace(tensors[O_PROJ], shape=(1,))
    tensors["other"] = tensors[NORM]
    text = refused(folder, tensors, model)
    assert "and 4 more" in text and sum(name in text for name in lost) == 3
    assert O_PROJ in text and "unknown other" in text

"""Models as Hugging Face folders: what was loaded comes out byte for byte, on any mesh."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from absl import logging
from checkpoint import hf_random
from hurry import COMMAND_FLAGS
from jax.sharding import Mesh

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.hf_load import load_folder
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError

FP8, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
ROOT = Path(__file__).parents[2]
FOLDERS = {"ragged": hf_random.RAGGED, "aligned": hf_random.ALIGNED}


def mesh_of_eight():
    return Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))


def read(path):
    """Every tensor of a folder as (dtype, shape, bytes), by the reference reader."""
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    found = {}
    for file in sorted(set(index.values())):
        for name, tensor in safetensors.deserialize((path / file).read_bytes()):
            assert index[name] == file
            found[name] = tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])
    assert set(found) == set(index)
    return found


def stored(tensors):
    """The same of numpy arrays."""
    return {
        name: (hf_random.STORED_NAMES[tensor.dtype], tensor.shape, tensor.tobytes())
        for name, tensor in tensors.items()
    }


def changed(found, expected):
    assert set(found) == set(expected)
    return {name for name in expected if found[name] != expected[name]}


def dequantized(tensors, dtype):
    """The folder without FP8, as `dtype`: scales multiply in float32, rounded once."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        value = tensor.astype(np.float32)
        if name + "_scale_inv" in tensors:
            wide = np.kron(tensors[name + "_scale_inv"], np.ones((128, 128), np.float32))
            value *= wide[: value.shape[0], : value.shape[1]]
        found[name] = value.astype(np.float32 if name.endswith("bias") else dtype)
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder a kind, with scales that no quantiser would leave, and its tensors."""
    base = tmp_path_factory.mktemp("save")
    return {
        name: (
            base / name,
            hf_random.write_random_folder(
                base / name, values=values, recoverable=False, seed=len(name)
            ),
        )
        for name, values in FOLDERS.items()
    }


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [
        ("ragged", FP8, None),
        ("ragged", jnp.float32, "fsdp_ep"),
        pytest.param("ragged", BF16, None, marks=pytest.mark.slow),
        pytest.param("aligned", FP8, "fsdp_ep", marks=pytest.mark.slow),
        pytest.param("aligned", jnp.float32, None, marks=pytest.mark.slow),
        ("aligned", BF16, "zero1_ep"),
    ],
)
def test_fp8_comes_out_byte_for_byte(folders, tmp_path, name, dtype, layout):
    path, tensors = folders[name]
    mesh = mesh_of_eight() if layout else None
    load_folder(path, dtype, mesh, layout or "zero1_ep").save_pretrained(tmp_path / "out", "fp8")
    assert changed(read(tmp_path / "out"), stored(tensors)) == set()


def quantize(w_NK):
    """The recipe of spec §5.1 block by block, in numpy."""
    blocks = tuple(-(-dim // 128) for dim in w_NK.shape)
    codes, scales = np.zeros(w_NK.shape, ml_dtypes.float8_e4m3fn), np.zeros(blocks, np.float32)
    for a, b in np.ndindex(blocks):
        at = slice(128 * a, 128 * a + 128), slice(128 * b, 128 * b + 128)
        scales[a, b] = np.float32(max(np.abs(w_NK[at]).max(), 1e-4)) / np.float32(448)
        codes[at] = np.clip(w_NK[at] / scales[a, b], -448, 448).astype(codes.dtype)
    return codes, scales


def test_a_trained_expert_is_quantized_again_and_nothing_else(folders, tmp_path):
    path, tensors = folders["ragged"]
    model = DeepSeekV3.from_pretrained(path, mesh=mesh_of_eight())
    w2 = model.moe_blocks.ffn.experts.w2
    step = np.random.default_rng(0).normal(size=w2.shape[2:]).astype(np.float32)
    w2[...] = w2[...].at[1, 5, :, :128].add(step[:, :128])  # the first block of rows as stored
    model.save_pretrained(tmp_path / "out", "fp8")
    found = read(tmp_path / "out")
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    assert changed(found, stored(tensors)) == {name, name + "_scale_inv"}

    trained = dequantized(tensors, np.float32)[name]
    trained[:128] += step.T[:128]
    codes, scales = quantize(trained)
    codes[128:], scales[1:] = tensors[name][128:], tensors[name + "_scale_inv"][1:]
    assert found[name] == stored({name: codes})[name]
    assert found[name + "_scale_inv"][2] == scales.tobytes()


@pytest.mark.parametrize("loaded", [FP8, jnp.float32])
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_fp8_leaves_dequantized(folders, tmp_path, loaded, dtype):
    path, tensors = folders["ragged"]
    DeepSeekV3.from_pretrained(path, dtype=loaded).save_pretrained(tmp_path / "out", dtype)
    expected = dequantized(tensors, {"bf16": ml_dtypes.bfloat16, "f32": np.float32}[dtype])
    assert changed(read(tmp_path / "out"), stored(expected)) == set()


@pytest.mark.parametrize("kind", ["ragged", "v2_lite"])
def test_full_precision_comes_out_byte_for_byte(tmp_path, kind):
    values = {"ragged": hf_random.RAGGED, "v2_lite": hf_random.V2_LITE}[kind]
    tensors = hf_random.write_random_folder(tmp_path / "in", values=values, dtype="f32")
    model = DeepSeekV3.from_pretrained(tmp_path / "in")
    model.save_pretrained(tmp_path / "f32", "f32")
    assert changed(read(tmp_path / "f32"), stored(tensors)) == set()
    model.save_pretrained(tmp_path / "bf16", "bf16")
    expected = dequantized(tensors, ml_dtypes.bfloat16)
    assert changed(read(tmp_path / "bf16"), stored(expected)) == set()
    model.save_pretrained(tmp_path / "fp8", "fp8")
    for name, tensor in list(tensors.items()):
        if "_proj" in name and "eh_proj" not in name:
            expected[name], expected[name + "_scale_inv"] = quantize(tensor)
    assert changed(read(tmp_path / "fp8"), stored(expected)) == set()


def test_small_files_and_config_are_carried_along(folders, tmp_path):
    path, _ = folders["ragged"]
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"[1]", "modeling.py": b"pass\n"}
    for name, content in files.items():
        (path / name).write_bytes(content)
    model = DeepSeekV3.from_pretrained(path)
    for name in files:
        (path / name).unlink()
    model.save_pretrained(tmp_path / "out", "bf16")
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files} == files
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 1 and config["moe_intermediate_size"] == 96
    assert DeepSeekV3.from_pretrained(tmp_path / "out").config == model.config


def test_weights_that_are_no_numbers_do_not_become_fp8(folders, tmp_path):
    model = DeepSeekV3.from_pretrained(folders["ragged"][0])
    kernel = model.dense_blocks.attn.wo.kernel
    kernel[...] = kernel[...].at[0, 3, 3].set(jnp.nan)
    with pytest.raises(UserError, match="o_proj.weight holds NaN"):
        model.save_pretrained(tmp_path / "out", "fp8")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_can_be_given(folders, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    path, _ = folders["ragged"]
    model = DeepSeekV3.from_pretrained(path, dtype=FP8)
    model.save_pretrained(tmp_path / "without", "fp8")
    assert len(warnings) == 1 and "no tokenizer" in warnings[0]
    large = train_tokenizer(["def f(x):\n    return x\n"] * 9, 290)
    with pytest.raises(UserError, match="vocab_size=64"):
        model.save_pretrained(tmp_path / "with", "fp8", tokenizer=large)


def test_errors_come_before_anything_is_written(folders, tmp_path):
    path, _ = folders["ragged"]
    model = DeepSeekV3.from_pretrained(path, dtype=FP8)
    with pytest.raises(UserError, match="did you mean 'fp8'"):
        model.save_pretrained(tmp_path / "out", "fp88")
    assert list(tmp_path.iterdir()) == []
    before = sorted(path.iterdir())
    with pytest.raises(UserError, match="exists"):
        model.save_pretrained(path, "fp8")
    assert sorted(path.iterdir()) == before


@pytest.mark.slow
def test_two_processes_load_and_save_together(folders, tmp_path):
    """Each reads the experts of its own devices; together they write what one would."""
    path, tensors = folders["ragged"]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {COMMAND_FLAGS}",
        "PYTHONPATH": str(ROOT),
    }
    worker = str(Path(__file__).with_name("hf_process_worker.py"))
    processes = [
        subprocess.Popen(
            [sys.executable, worker, str(port), str(index), str(path), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and "passed" in output, output[-3000:]
    for name in ("float8_e4m3fn", "float32"):
        assert changed(read(tmp_path / name), stored(tensors)) == set()
    DeepSeekV3.from_pretrained(path).save_pretrained(tmp_path / "alone", "fp8")
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "float32" / file.name).read_bytes() == file.read_bytes(), file.name

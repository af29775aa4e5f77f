"""tools.convert_checkpoint between Hugging Face folders: every number, every kill, bad input."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import hf_random
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.checkpoint import hf_convert, hf_writer, manifest
from dsv3_jax.checkpoint.hf_convert import convert_folder
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.errors import UserError

ROOT = Path(__file__).parents[2]
FP8, BF16, F32, F16 = ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, np.float32, np.float16
SMALL_FILES = {"tokenizer.json": b'{"a": 1}', "modeling_deepseek.py": b"x = 1\n", "LICENSE": b"L"}
INDEX = "model.safetensors.index.json"


def command(*flags):
    return [sys.executable, "-m", "tools.convert_checkpoint", *map(str, flags)]


def run(*flags):
    return subprocess.run(
        command(*flags),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def per_block(array_BT, shape):
    """One number a block, spread over its rows and columns."""
    return np.repeat(np.repeat(array_BT, 128, 0), 128, 1)[: shape[0], : shape[1]]


def quantized(w_NK):
    """Codes and scales of a matrix by numpy."""
    w_NK = w_NK.astype(F32)
    N, K = w_NK.shape
    padded = np.zeros((-(-N // 128) * 128, -(-K // 128) * 128), F32)
    padded[:N, :K] = np.abs(w_NK)
    max_BT = padded.reshape(padded.shape[0] // 128, 128, -1, 128).max((1, 3))
    s_BT = np.maximum(max_BT, F32(1e-4)) / F32(448)
    x_NK = w_NK / per_block(s_BT, w_NK.shape)
    return np.clip(x_NK, -448, 448).astype(FP8), s_BT


def expected(tensors, dtype):
    """What a conversion must give, tensor by tensor, computed from the source's tensors."""
    found = {}
    plain = F32 if dtype == "f32" else BF16
    for name, array in tensors.items():
        if name.endswith("_scale_inv"):
            if dtype == "fp8":
                found[name] = array
        elif name.endswith("e_score_correction_bias"):
            found[name] = array.astype(F32)
        elif array.dtype == FP8 and dtype != "fp8":
            scales = per_block(tensors[f"{name}_scale_inv"], array.shape)
            found[name] = (array.astype(F32) * scales).astype(plain)
        elif "_proj" in name and "eh_proj" not in name and dtype == "fp8" and array.dtype != FP8:
            found[name], found[f"{name}_scale_inv"] = quantized(array)
        else:
            found[name] = array if array.dtype == FP8 else array.astype(plain)
    return found


def assert_folder_holds(folder, tensors):
    stored = open_folder(folder).tensors
    assert stored.keys() == tensors.keys()
    for name, array in tensors.items():
        actual = stored[name].read()
        assert actual.dtype == array.dtype and actual.shape == array.shape, name
        np.testing.assert_array_equal(
            actual.reshape(-1).view(np.uint8), array.reshape(-1).view(np.uint8), err_msg=name
        )
    manifest.verify(folder)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(params=[None, 20_000], ids=["whole tensors", "several chunks a tensor"])
def chunk_numbers(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(hf_convert, "_CHUNK_NUMBERS", request.param)


@pytest.mark.parametrize("to", ["fp8", "bf16", "f32"])
@pytest.mark.parametrize("source", ["fp8", "bf16", "f32"])
def test_every_tensor_equals_numpy(tmp_path, chunk_numbers, source, to):
    seed = random.randrange(1 << 30)
    tensors = hf_random.write_random_folder(
        tmp_path / "src", dtype=source, seed=seed, recoverable=False
    )
    for name, content in SMALL_FILES.items():
        (tmp_path / "src" / name).write_bytes(content)
    before = contents(tmp_path / "src")
    convert_folder(tmp_path / "src", tmp_path / "dst", to, max_shard_bytes=1_000_000)
    assert_folder_holds(tmp_path / "dst", expected(tensors, to))
    assert contents(tmp_path / "src") == before
    for name, content in SMALL_FILES.items():
        assert (tmp_path / "dst" / name).read_bytes() == content


@pytest.mark.parametrize("values", ["ALIGNED", "V2_LITE"])
def test_other_models_and_a_folder_of_one_file(tmp_path, values):
    values = getattr(hf_random, values)
    tensors = hf_random.write_random_folder(
        tmp_path / "src", values=values, dtype="bf16", num_shards=1
    )
    convert_folder(tmp_path / "src", tmp_path / "dst", "fp8")
    assert_folder_holds(tmp_path / "dst", expected(tensors, "fp8"))


def test_half_precision_and_mixed_sources(tmp_path, monkeypatch):
    """F16 throughout but for one projection that is FP8 already."""
    monkeypatch.setitem(hf_random.STORED_NAMES, np.dtype(F16), "F16")
    hf_random.write_random_folder(tmp_path / "src", dtype="fp8", num_shards=1)
    tensors = hf_random.random_tensors(hf_random.RAGGED, "f32", seed=3)
    tensors = {
        name: array if name.endswith("bias") else array.astype(F16)
        for name, array in tensors.items()
    }
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[name], tensors[f"{name}_scale_inv"] = quantized(tensors[name])
    hf_random.write_safetensors(tmp_path / "src/model.safetensors", tensors)
    for dtype in ("fp8", "bf16", "f32"):
        convert_folder(tmp_path / "src", tmp_path / dtype, dtype)
        assert_folder_holds(tmp_path / dtype, expected(tensors, dtype))


def test_a_folder_without_the_mtp_layer_stays_without(tmp_path):
    values = hf_random.RAGGED | {"num_nextn_predict_layers": 0}
    tensors = hf_random.write_random_folder(tmp_path / "src", values=values, dtype="f32")
    config = json.loads((tmp_path / "src/config.json").read_text())
    config["num_nextn_predict_layers"] = 1  # as transformers leaves it
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    convert_folder(tmp_path / "src", tmp_path / "dst", "bf16")
    assert_folder_holds(tmp_path / "dst", expected(tensors, "bf16"))


def test_codes_survive_bf16_and_bytes_survive_f32(tmp_path):
    """Codes always, since each block holds a 448; scales to a rounding to bfloat16."""
    tensors = hf_random.write_random_folder(
        tmp_path / "src", dtype="fp8", seed=random.randrange(1 << 30)
    )
    for middle in ("bf16", "f32"):
        convert_folder(tmp_path / "src", tmp_path / middle, middle)
        convert_folder(tmp_path / middle, tmp_path / f"{middle}_back", "fp8")
    assert_folder_holds(tmp_path / "f32_back", tensors)
    back = open_folder(tmp_path / "bf16_back").tensors
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        if name.endswith("_scale_inv"):
            np.testing.assert_allclose(back[name].read(), array, rtol=2.0**-8)
        else:
            np.testing.assert_array_equal(back[name].read(), array, err_msg=name)


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_config_differs_in_dtypes_only(tmp_path, key):
    hf_random.write_random_folder(tmp_path / "src", dtype="fp8")
    config = json.loads((tmp_path / "src/config.json").read_text())
    config = {key if name == "torch_dtype" else name: v for name, v in config.items()}
    config["auto_map"] = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
    (tmp_path / "src/config.json").write_text(json.dumps(config))
    plain = {name: v for name, v in config.items() if name != "quantization_config"}
    written = {}
    for dtype in ("bf16", "f32", "fp8"):
        source = tmp_path / ("src" if dtype != "fp8" else "bf16")
        convert_folder(source, tmp_path / dtype, dtype)
        written[dtype] = json.loads((tmp_path / dtype / "config.json").read_text())
    assert written["bf16"] == plain
    assert written["f32"] == plain | {key: "float32"}
    assert written["fp8"] == config


def test_killed_at_random_moments_the_result_is_the_same(tmp_path):
    """SIGKILL, five times, of a command that makes some 30 files."""
    hf_random.write_random_folder(tmp_path / "src", dtype="bf16")
    flags = (f"--src={tmp_path / 'src'}", "--to=hf", "--dtype=fp8", "--max_shard_gb=0.00006")
    start = time.monotonic()
    result = run(*flags, f"--dst={tmp_path / 'whole'}")
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stderr
    killed = 0
    while killed < 5:
        process = subprocess.Popen(
            command(*flags, f"--dst={tmp_path / 'dst'}"), cwd=ROOT, stdout=subprocess.DEVNULL
        )
        time.sleep(random.uniform(0.3, 1) * seconds)
        process.kill()
        if process.wait() != -9:
            break  # it was faster
        killed += 1
    done = (tmp_path / "dst").exists()
    result = run(*flags, f"--dst={tmp_path / 'dst'}")
    assert result.returncode == (2 if done else 0), result.stderr
    assert contents(tmp_path / "dst") == contents(tmp_path / "whole")
    assert not hf_writer.incomplete_path(tmp_path / "dst").exists()


def test_a_changed_source_is_not_continued(tmp_path, monkeypatch):
    source, destination = tmp_path / "src", tmp_path / "dst"
    hf_random.write_random_folder(source, dtype="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(hf_convert._Converter, "chunks", lambda self, t: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_folder(source, destination, "fp8")
    os.utime(next(source.glob("*.safetensors")))
    with pytest.raises(UserError, match="unfinished folder of something else .source_files differ"):
        convert_folder(source, destination, "fp8")


def edit_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder, change):
    """Writes the folder again as one file, changed."""
    tensors = {name: t.read() for name, t in open_folder(folder).tensors.items()}
    change(tensors)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    hf_random.write_safetensors(folder / "model.safetensors", tensors)


GATE = "model.layers.2.mlp.experts.1.gate_proj.weight"


def lose_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_shard(folder):
    victim = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(victim, victim.stat().st_size - 1)


def point_nowhere(folder):
    edit_index(folder, lambda where: where.update({GATE: "model-9.safetensors"}))


def point_to_another_file(folder):
    def change(where):
        where[GATE] = next(file for file in where.values() if file != where[GATE])

    edit_index(folder, change)


def wrong_shape(folder):
    edit_tensors(folder, lambda t: t.update({GATE: t[GATE][:-1]}))


def missing_scale(folder):
    edit_tensors(folder, lambda t: t.pop(f"{GATE}_scale_inv"))


def unknown_name(folder):
    edit_tensors(folder, lambda t: t.update({"model.layers.1.extra.weight": t[GATE]}))


def no_config(folder):
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_shard, "lacks model-00002-of-000003.safetensors; download"),
        (cut_shard, "model-00003-of-000003.safetensors is cut short"),
        (point_nowhere, "lacks model-9.safetensors"),
        (point_to_another_file, f"places {GATE}"),
        (wrong_shape, f"{GATE} is 95 x 160 instead of 96 x 160"),
        (missing_scale, f"{GATE} is FP8 but has no scale_inv"),
        (unknown_name, "unknown model.layers.1.extra.weight"),
        (no_config, "config.json cannot be read"),
    ],
)
def test_a_damaged_source_is_one_line_and_nothing_is_made(tmp_path, damage, message):
    hf_random.write_random_folder(tmp_path / "src", dtype="fp8")
    damage(tmp_path / "src")
    before = contents(tmp_path)
    assert_refused(run(f"--src={tmp_path / 'src'}", f"--dst={tmp_path / 'dst'}"), message)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def assert_refused(result, message):
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr and result.stdout == ""


def test_bad_flags_are_one_line(tmp_path):
    source = tmp_path / "src"
    hf_random.write_random_folder(source, dtype="fp8")
    before = contents(tmp_path)
    for destination, message in (
        (source, "exists; delete it"),
        (source / "below", "lies in the source"),
        (tmp_path, "exists; delete it"),
        (tmp_path / "no/dst", "no is not a folder; make it"),
        ("/proc/dst", "error"),
    ):
        assert_refused(run(f"--src={source}", f"--dst={destination}"), message)
    good = f"--dst={tmp_path / 'dst'}"
    assert_refused(run(f"--src={tmp_path / 'nothing'}", good), "nothing is not a folder")
    assert_refused(run(f"--src={source}", good, "--dtype=fp4"), "fp8|bf16|f32")
    assert_refused(run(f"--src={source}", good, "--max_shard_gb=0"), "max_shard_gb")
    assert_refused(run(f"--src={source}"), "--dst=DIR")
    assert_refused(run(f"--src={source}", good, "bf16"), "two dashes")
    with pytest.raises(UserError, match="dtype=fp4 is unknown; allowed: fp8, bf16, f32"):
        convert_folder(source, tmp_path / "dst", "fp4")
    assert contents(tmp_path) == before


def test_mistakes_are_found_before_jax_is_imported(tmp_path):
    hf_random.write_random_folder(tmp_path / "src", dtype="fp8")
    (tmp_path / "dst").mkdir()
    program = f"""
import sys
from pathlib import Path
from dsv3_jax.checkpoint.hf_convert import convert_folder
from dsv3_jax.errors import UserError
try:
    convert_folder(Path({str(tmp_path / "src")!r}), Path({str(tmp_path / "dst")!r}), "bf16")
except UserError:
    sys.exit("jax" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_fp8_cannot_express_are_refused(tmp_path, bad):
    hf_random.write_random_folder(tmp_path / "src", dtype="bf16")

    def spoil(tensors):
        tensors[GATE][5, 150] = bad

    edit_tensors(tmp_path / "src", spoil)
    with pytest.raises(UserError, match=f"{GATE} .* holds NaN or infinity"):
        convert_folder(tmp_path / "src", tmp_path / "dst", "fp8")
    assert not (tmp_path / "dst").exists()
    convert_folder(tmp_path / "src", tmp_path / "f32", "f32")

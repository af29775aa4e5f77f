"""tools.{inspect,verify}_checkpoint and tools.diff_checkpoints, as commands."""

import dataclasses
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoint.hf_random import RAGGED, V2_LITE, write_random_folder, write_safetensors
from flax import nnx

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hf_config import read_model_config
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.errors import UserError
from dsv3_jax.model.router import RouterBias
from dsv3_jax.overrides import to_dict
from tools import diff_checkpoints, inspect_checkpoint, verify_checkpoint

ROOT = Path(__file__).parents[2]
RELEASED = ROOT.parent / "shared" / "data" / "deepseek" / "hf_params_map.json.gz"


def run(tool, *args):
    return subprocess.run(
        [sys.executable, "-m", f"tools.{tool}", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    manager = CheckpointManager(workdir / "checkpoints", keep=3)
    rng = np.random.default_rng(0)
    state = {
        "params": {"table": rng.normal(size=(100, 30)).astype(np.float32)},
        "moments": {"table": rng.normal(size=(100, 30)).astype(ml_dtypes.bfloat16)},
        "step": np.array(3, np.int32),
    }
    for step in (1, 2):
        manager.save(step, state, {}, wait=True)
    manager.close()
    return workdir


def test_inspect_prints_every_array_and_totals(workdir):
    result = run("inspect_checkpoint", workdir)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][:2] == ["step", "2"]
    assert "params.table float32 100 x 30 3,000 12,000".split() in lines
    assert "moments.table bfloat16 100 x 30 3,000 6,000".split() in lines
    assert "step int32 scalar 1 4".split() in lines
    assert "total 3 arrays 6,001 18,004".split() in lines


def test_verify_reports_each_step_and_damage(workdir):
    result = run("verify_checkpoint", workdir)
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == ["step 1", "step 2"]
    victim = next(p for p in (workdir / "checkpoints/1/d").rglob("*") if p.is_file())
    intact = victim.read_bytes()
    victim.write_bytes(intact[:-1] + bytes([intact[-1] ^ 4]))
    result = run("verify_checkpoint", workdir)
    victim.write_bytes(intact)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "step 1 is damaged" in result.stderr and victim.name in result.stderr
    assert "step 2" in result.stdout


@pytest.mark.parametrize("tool", ["inspect_checkpoint", "verify_checkpoint", "diff_checkpoints"])
def test_wrong_arguments_are_one_line(tool, tmp_path):
    for args in ([], [tmp_path], [tmp_path / "missing"]):
        result = run(tool, *args)
        assert result.returncode == 2 and result.stderr.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tensors of FP8, float32 and V2-like folders, by name; the folders lie at their keys."""
    root = tmp_path_factory.mktemp("hf")
    return {
        root / "fp8": write_random_folder(root / "fp8", values=RAGGED, dtype="fp8"),
        root / "f32": write_random_folder(root / "f32", values=RAGGED, dtype="f32", seed=1),
        root / "v2": write_random_folder(root / "v2", values=V2_LITE, dtype="bf16"),
    }


@pytest.fixture
def fp8(folders, tmp_path):
    """A copy of the FP8 folder to damage."""
    return Path(shutil.copytree(next(iter(folders)), tmp_path / "copy"))


def printed(tool, capsys, *args):
    """Exit code, lines of stdout."""
    code = tool.main([tool.__name__, *map(str, args)])
    return code, capsys.readouterr().out.splitlines()


def test_inspect_counts_the_released_map_exactly_within_seconds():
    if not RELEASED.is_file():
        pytest.skip("needs the map of the released files")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("inspect_checkpoint", RELEASED)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    # Of processor time: other tests may have the cores, and make each of them slower.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "F8_E4M3 45,808 163 680,571,043,840 680,571,043,840",
        "BF16 316 68 3,918,786,560 7,837,573,120",
        "F32 45,867 163 41,555,600 166,222,400",
        "embedding 1 1 926,679,040 1,853,358,080",
        "head 1 1 926,679,040 1,853,358,080",
        "total 91,991 163 684,531,386,000 688,574,839,360",
        "main model, total 671,026,419,200",
        "without selection biases 671,026,404,352",
        "activated by a token 37,552,297,472",
        "without embedding 36,625,618,432",
        "without embedding and head 35,698,939,392",
        "MTP, unique 11,610,068,224",
        "activated, with embedding and head 2,541,458,688",
        "155 scales lie in another file than their weight",
        "the counts are those of config.json",
    ):
        assert line in lines, line
    numbers = {line.rpartition(" ")[0].split(" ")[0]: line.split()[-2] for line in lines if line}
    # 58 layers of 256 experts of 44,040,192; 61 of 187,107,328 in attention (spec §1.1)
    assert f"{58 * 256 * 44_040_192:,}" == numbers["routed"]
    assert f"{61 * 187_107_328:,}" == numbers["attention"]
    assert f"{58 * 44_040_192:,}" == numbers["shared"]
    assert f"{3 * 396_361_728:,}" == numbers["dense"]
    assert f"{58 * (1_835_008 + 256):,}" == numbers["router"]
    assert f"{61 * 14_336 + 7_168:,}" == numbers["norms"]
    assert f"{40_838_232 + 702_264:,}" == numbers["scales"]


def test_inspect_does_not_import_jax_for_folders_and_maps(folders):
    code = (
        "import sys; from tools import inspect_checkpoint;"
        f"inspect_checkpoint.main(['', {str(next(iter(folders)))!r}]);"
        "assert not {'jax', 'flax', 'orbax'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_inspect_shows_the_same_of_a_folder_its_index_and_its_map(folders, tmp_path, capsys):
    for path, tensors in folders.items():
        _, of_folder = printed(inspect_checkpoint, capsys, path)
        _, of_index = printed(inspect_checkpoint, capsys, path / "model.safetensors.index.json")
        stored = open_folder(path).tensors
        written = {
            name: {"shape": tensor.shape, "dtype": tensor.dtype, "file": tensor.file.name}
            for name, tensor in stored.items()
        }
        assert written.keys() == tensors.keys()
        (tmp_path / "map.json.gz").write_bytes(gzip.compress(json.dumps(written).encode()))
        (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
        _, of_map = printed(inspect_checkpoint, capsys, tmp_path / "map.json.gz")
        assert of_folder == of_index == of_map
        total = next(line.split() for line in of_folder if line.startswith("total"))
        numbers = sum(tensor.size for tensor in tensors.values())
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        assert total == ["total", f"{len(tensors):,}", "3", f"{numbers:,}", f"{num_bytes:,}"]
        assert of_folder[-1] == "the counts are those of config.json"
        (tmp_path / "config.json").unlink()
        _, without = printed(inspect_checkpoint, capsys, tmp_path / "map.json.gz")
        assert without[-1].startswith("no config.json")
        assert not any("activated" in line for line in without)


def test_inspect_tells_when_config_json_describes_another_model(fp8, capsys):
    config = json.loads((fp8 / "config.json").read_text()) | {"n_routed_experts": 16}
    (fp8 / "config.json").write_text(json.dumps(config))
    code, lines = printed(inspect_checkpoint, capsys, fp8)
    assert not code and any(line.startswith("config.json describes another") for line in lines)


@pytest.mark.parametrize(
    "text", ["{", "[]", "7", '{"a": 1}', '{"a": {"shape": 3}}', '{"weight_map": 3}', '"abc"']
)
def test_inspect_refuses_other_json(tmp_path, text):
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UserError, match="map.json"):
        inspect_checkpoint.main(["", str(tmp_path / "map.json")])


def test_verify_passes_a_sound_folder(folders, capsys):
    for path in folders:
        code, lines = printed(verify_checkpoint, capsys, path)
        assert not code and "no MANIFEST.json" in lines[1] and "finite" in lines[-1]


def rewrite(folder, change):
    """Changes the bytes of one tensor where they lie."""

    def damage(name):
        tensor = open_folder(folder).tensors[name]
        raw = bytearray(tensor.file.read_bytes())
        array = np.frombuffer(raw, np.uint8, tensor.num_bytes, tensor.offset)
        change(array)
        tensor.file.write_bytes(raw)

    return damage


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"
BIAS = "model.layers.2.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        (O_PROJ, np.uint8(0x7F), "not finite"),
        (O_PROJ, np.uint8(0xFF), "not finite"),
        (NORM, ml_dtypes.bfloat16(np.nan), "not finite"),
        (NORM, ml_dtypes.bfloat16(-np.inf), "not finite"),
        (BIAS, np.float32(np.inf), "not finite"),
        (f"{O_PROJ}_scale_inv", np.float32(np.nan), "not finite and positive"),
        (f"{O_PROJ}_scale_inv", np.float32(0), "not finite and positive"),
        (f"{O_PROJ}_scale_inv", np.float32(-1e-3), "not finite and positive"),
    ],
)
def test_verify_finds_one_bad_number(fp8, name, value, what):
    raw = np.frombuffer(np.asarray(value).tobytes(), np.uint8)
    place = open_folder(fp8).tensors[name].size // 2 * raw.size
    rewrite(fp8, lambda array: array.__setitem__(slice(place, place + raw.size), raw))(name)
    with pytest.raises(UserError) as error:
        verify_checkpoint.main(["", str(fp8)])
    size = open_folder(fp8).tensors[name].size
    assert f"{name} (1 of {size:,} {what})" in str(error.value)


def test_verify_compares_the_files_with_the_manifest(fp8, capsys):
    manifest.write(fp8, {"step": 0})
    code, lines = printed(verify_checkpoint, capsys, fp8)
    assert not code and lines[1].startswith("5 files") and lines[1].endswith("crc32 ok")
    # A flipped low bit of a code is a number as good as any other.
    rewrite(fp8, lambda array: array.__setitem__(7, array[7] ^ 1))(O_PROJ)
    file = open_folder(fp8).tensors[O_PROJ].file.name
    result = run("verify_checkpoint", fp8)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "is damaged" in result.stderr and file in result.stderr


def test_verify_checks_names_before_it_reads(fp8):
    config = json.loads((fp8 / "config.json").read_text()) | {"hidden_size": 161}
    (fp8 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its config.json"):
        verify_checkpoint.main(["", str(fp8)])


def test_diff_of_equal_folders(folders, capsys):
    for path, tensors in folders.items():
        code, lines = printed(diff_checkpoints, capsys, path, path)
        weights = [tensor for name, tensor in tensors.items() if not name.endswith("_scale_inv")]
        numbers = sum(tensor.size for tensor in weights)
        assert code == 0 and len(lines) == 2
        assert lines[0].startswith(f"compared {len(weights):,} tensors, {numbers:,} numbers")


def test_diff_compares_what_fp8_stands_for(folders, tmp_path, capsys):
    """The oracle dequantises block by block."""
    path, tensors = next(iter(folders.items()))
    exact, rounded = {}, {}
    for name, tensor in tensors.items():
        scales = tensors.get(f"{name}_scale_inv")
        if name.endswith("_scale_inv"):
            continue
        value = tensor.astype(np.float32)
        for a, b in np.ndindex(scales.shape) if scales is not None else ():
            value[128 * a : 128 * a + 128, 128 * b : 128 * b + 128] *= scales[a, b]
        exact[name] = value
        is_bias = name.endswith("bias")
        rounded[name] = value if is_bias else value.astype(ml_dtypes.bfloat16)
    for name, contents in (("exact", exact), ("rounded", rounded)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes((path / "config.json").read_bytes())
        write_safetensors(tmp_path / name / "model.safetensors", contents)
    code, lines = printed(diff_checkpoints, capsys, path, tmp_path / "exact")
    assert code == 0, lines
    code, lines = printed(diff_checkpoints, capsys, path, tmp_path / "rounded")
    differing = {n for n in exact if (exact[n] != rounded[n].astype(np.float32)).any()}
    assert (
        code == 1
        and f"{len(exact) - len(differing)} are equal, {len(differing)} differ" in (lines[-2])
    )
    relative = {
        n: np.abs(exact[n] - rounded[n].astype(np.float32)).max() / np.abs(rounded[n]).max()
        for n in differing
    }
    assert lines[0].partition(":")[0] == max(relative, key=lambda n: float(relative[n]))
    assert len([line for line in lines if "|a - b|" in line]) == 10


def test_diff_shows_the_place_and_both_values(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(diff_checkpoints, "_CHUNK_NUMBERS", 128 * 160)  # several chunks a tensor
    path, tensors = list(folders.items())[1]
    changed = {name: tensor.copy() for name, tensor in tensors.items()}
    table, gone, reshaped = "model.layers.0.mlp.gate_proj.weight", NORM, "lm_head.weight"
    changed[table][3, 5] += np.float32(0.25)
    changed[table][170, 44] = 100.0
    changed[table][171, 44] = np.nan
    changed[table][0, 0] = tensors[table][0, 0]
    del changed[gone]
    changed["extra"] = np.zeros(3, np.float32)
    changed[reshaped] = changed[reshaped][:-1]
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    write_safetensors(other / "model.safetensors", changed)
    result = run("diff_checkpoints", path, other)
    assert result.returncode == 1, result.stderr
    code, lines = printed(diff_checkpoints, capsys, path, other)
    assert code == 1 and lines == result.stdout.splitlines()
    assert lines[0] == f"only in A: 1 tensors: {gone}"
    assert lines[1] == "only in B: 1 tensors: extra"
    assert reshaped in lines[2] and "(64, 160) and (63, 160)" in lines[2]
    assert lines[3].startswith(f"{table}: |a - b| up to inf") and "[171, 44]" in lines[3]
    assert f"{tensors[table][171, 44]:.9g} and nan; 3 differ" in lines[3]
    changed[table][171, 44] = tensors[table][171, 44]
    write_safetensors(other / "model.safetensors", changed)
    _, lines = printed(diff_checkpoints, capsys, path, other)
    difference = abs(100.0 - float(tensors[table][170, 44]))
    assert f"up to {difference:.3g}, {difference / 100:.3g} of max |b|, at [170, 44]" in lines[3]
    assert f"{tensors[table][170, 44]:.9g} and 100; 2 differ" in lines[3]


def test_diff_of_folders_that_hold_equal_nans(fp8, capsys):
    rewrite(fp8, lambda array: array.__setitem__(9, 0x7F))(O_PROJ)
    assert printed(diff_checkpoints, capsys, fp8, fp8)[0] == 0


@pytest.mark.parametrize("kind", ["fp8", "f32", "v2"])
def test_diff_of_a_folder_and_a_run_that_was_loaded_from_it(folders, tmp_path, kind, capsys):
    path = next(path for path in folders if path.name == kind)
    architecture = read_model_config(open_folder(path).config, "config.json")
    config = dataclasses.replace(configs.get("tiny"), model=architecture)
    _, params, bias = nnx.split(DeepSeekV3.from_pretrained(path), nnx.Param, RouterBias)
    state = {"params": nnx.to_pure_dict(params), "router_bias": nnx.to_pure_dict(bias)}
    manager = CheckpointManager(tmp_path / "run" / "checkpoints", keep=9)
    manager.save(4, state, {"config": to_dict(config)}, wait=True)
    half = state["params"]["moe_blocks"]["ffn"]["experts"]["w13"]
    width = half.shape[-1] // 2
    # layer 1 of the stack, expert 6, input 7; the last column of up: [out, in] is [width - 1, 7]
    half = half.at[1, 6, 7, 2 * width - 1].set(-3.5)
    state["params"]["moe_blocks"]["ffn"]["experts"]["w13"] = half
    manager.save(5, state, {"config": to_dict(config)}, wait=True)
    manager.close()
    run_path = tmp_path / "run" / "checkpoints"
    code, lines = printed(diff_checkpoints, capsys, path, run_path / "4")
    assert code == 0, lines
    assert printed(diff_checkpoints, capsys, run_path / "4", path)[0] == 0
    code, lines = printed(diff_checkpoints, capsys, run_path / "4", tmp_path / "run")
    assert code == 1 and "1 differ in 1 numbers" in lines[-2]
    assert lines[0].startswith("model.layers.2.mlp.experts.6.up_proj.weight: ")
    assert f"at [{width - 1}, 7]" in lines[0] and "and -3.5; 1 differ" in lines[0]

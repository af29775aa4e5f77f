"""Hugging Face folder -> run -> Hugging Face folder, and what the command refuses."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint import hf_random
from checkpoint.test_hf_save import changed, read, stored

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint import run_convert
from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError

VALUES = hf_random.RAGGED | {"vocab_size": 384, "num_hidden_layers": 2}


def convert(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.convert_checkpoint", *arguments],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("convert") / "hf"
    tensors = hf_random.write_random_folder(path, values=VALUES, dtype="f32", num_shards=1)
    train_tokenizer(["def f(x):\n    return x\n"] * 9, 290).save(path / "tokenizer.json")
    return path, tensors


def test_a_folder_becomes_a_run_and_comes_back(folder, tmp_path):
    path, tensors = folder
    done = convert(f"--src={path}", f"--dst={tmp_path / 'run'}", "--to=orbax")
    assert done.returncode == 0, done.stderr
    text = "def g(x):\n    return 7"
    ids = load_tokenizer(path / "tokenizer.json").encode(text)
    assert load_run_tokenizer(tmp_path / "run").encode(text) == ids
    model = DeepSeekV3.from_pretrained(tmp_path / "run")
    assert model.config == DeepSeekV3.from_pretrained(path).config
    with pytest.raises(UserError, match="save_pretrained"):
        DeepSeekV3.from_pretrained(tmp_path / "run", dtype=jnp.float8_e4m3fn)

    run_convert.export_run(tmp_path / "run", tmp_path / "out", "f32", 1_000_000)
    assert changed(read(tmp_path / "out"), stored(tensors)) == set()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert load_tokenizer(tmp_path / "out/tokenizer.json").encode(text) == ids
    assert (tmp_path / "out/tokenizer_config.json").is_file()


def test_existing_destinations_are_left_alone(folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    for to in ("--to=orbax", "--to=hf"):
        done = convert(f"--src={folder[0]}", f"--dst={tmp_path / 'run'}", to)
        assert done.returncode == 2 and "exists" in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["run", "notes.txt"]


def test_a_run_takes_no_dtype(folder, tmp_path):
    done = convert(f"--src={folder[0]}", f"--dst={tmp_path / 'run'}", "--to=orbax", "--dtype=fp8")
    assert done.returncode == 2 and "--dtype is for --to=hf" in done.stderr


def test_a_model_larger_than_memory_is_refused_unread(folder, tmp_path, monkeypatch):
    def nothing_is_loaded(*_):
        raise AssertionError("the model was loaded")

    size = sum(tensor.nbytes for tensor in folder[1].values())
    monkeypatch.setattr(run_convert, "_available_bytes", lambda: size)
    monkeypatch.setattr(run_convert, "load_folder", nothing_is_loaded)
    with pytest.raises(UserError, match="larger machine"):
        run_convert.import_run(folder[0], tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_import_leaves_is_continued(folder, tmp_path):
    (tmp_path / "run/checkpoints/pending.0").mkdir(parents=True)
    (tmp_path / "run/checkpoints/pending.0/part").write_bytes(b"cut")
    (tmp_path / "run/tokenizer.json").write_bytes(b"cut")
    run_convert.import_run(folder[0], tmp_path / "run")
    whole = (folder[0] / "tokenizer.json").read_bytes()
    assert (tmp_path / "run/tokenizer.json").read_bytes() == whole
    table = DeepSeekV3.from_pretrained(tmp_path / "run").embed.table[...]
    np.testing.assert_array_equal(table, folder[1]["model.embed_tokens.weight"])

"""Damaged files from elsewhere: read, or refused with a UserError; never another exception."""

import json
import math

import numpy as np
from fuzzing import damaged, fuzz

from dsv3_jax.checkpoint.hf_folder import INDEX, open_folder
from dsv3_jax.config import SourceConfig
from dsv3_jax.data.sources import open_source
from dsv3_jax.data.tokenizer import load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError


def write_shard(path, tensors):
    header, data = {}, b""
    for name, array in tensors.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": span}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_folder(folder):
    shards = {"a.safetensors": {"x": np.ones((2, 3), np.float32)}}
    shards["b.safetensors"] = {"y": np.ones(4, np.float32), "z": np.ones((), np.float32)}
    for name, tensors in shards.items():
        write_shard(folder / name, tensors)
    (folder / "config.json").write_text("{}")
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def read_folder(folder):
    try:
        for tensor in open_folder(folder).tensors.values():
            # Headers may promise no more than the file holds.
            assert tensor.num_bytes <= tensor.file.stat().st_size
            assert math.prod(tensor.shape) == tensor.size
    except UserError:
        pass


def test_safetensors_index(tmp_path):
    make_folder(tmp_path)
    good = (tmp_path / INDEX).read_bytes()
    assert set(open_folder(tmp_path).tensors) == {"x", "y", "z"}

    def check(content):
        (tmp_path / INDEX).write_bytes(content)
        read_folder(tmp_path)

    fuzz("safetensors index", damaged(good), check)


def test_safetensors_header(tmp_path):
    make_folder(tmp_path)
    shard = tmp_path / "b.safetensors"

    def check(content):
        shard.write_bytes(content)
        read_folder(tmp_path)

    fuzz("safetensors header", damaged(shard.read_bytes()), check)


def test_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["some text to train on"] * 9, 300).save(path)

    def check(content):
        path.write_bytes(content)
        try:
            load_tokenizer(path).encode("some text")
        except UserError:
            pass

    fuzz("tokenizer file", damaged(path.read_bytes()), check)


def test_jsonl_records(tmp_path):
    path = tmp_path / "a.jsonl"
    good = b'{"text": "one", "n": [1, {"a": null}]}\n{"text": "tw\\u00f6"}\n\n{"text": "three"}\n'

    def check(content):
        path.write_bytes(content)
        source = open_source(SourceConfig(kind="jsonl", path=str(path)))
        for i in range(len(source)):
            try:
                source[i].encode()
            except UserError as error:
                assert f"{path}:" in str(error)

    fuzz("data records", damaged(good), check)

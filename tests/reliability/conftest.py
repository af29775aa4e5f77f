"""What the runs with faults are compared with."""

import json

import pytest
from flax import nnx
from runs import SMALL, losses, run

from dsv3_jax import DeepSeekV3
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.overrides import load_config
from dsv3_jax.posttrain.problems import arithmetic_records


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Losses of ten steps, in hexadecimal."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = run(workdir)
    assert code == 0, output
    return losses(workdir)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with random weights, the tokenizer, and conversations for them."""
    path = tmp_path_factory.mktemp("base") / "folder"
    model = DeepSeekV3(load_config("tiny", SMALL).model, runtime=Runtime(), rngs=nnx.Rngs(0))
    tokenizer = train_tokenizer(["1+2=3 15-4=11 What is it?\n"], 300)
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    records = [{"prompt": r["prompt"], "completion": r["answer"]} for r in arithmetic_records()]
    chats = path.parent / "chats.jsonl"
    chats.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path, chats

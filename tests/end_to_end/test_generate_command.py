"""`python -m experiments.generate` on a Hugging Face folder: the text that the library gives."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from hurry import COMMAND_FLAGS

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.checkpoint.pretrained import load_run_tokenizer
from dsv3_jax.data.chat import ChatTemplate, encode_chat
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.runtime import Runtime

ROOT = Path(__file__).parents[2]
QUESTION = "What is\n<｜User｜>?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model as a Hugging Face folder, wide awake: its logits are far from equal."""
    model = dataclasses.replace(
        configs.get("tiny").model, vocab_size=280, width=32, num_layers=2, init_std=0.3
    )
    path = tmp_path_factory.mktemp("generate") / "folder"
    tokenizer = train_tokenizer(["What is it? It is it.\n"], 280)
    model = DeepSeekV3(model, runtime=Runtime(), rngs=nnx.Rngs(0))
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    return path


def generate(folder, *arguments, said=""):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": COMMAND_FLAGS,
    }
    command = [sys.executable, "-m", "experiments.generate", f"--checkpoint={folder}", *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, input=said
    )


def test_a_chat_ends_where_the_model_ends_it(folder):
    model, tokenizer = DeepSeekV3.from_pretrained(folder), load_run_tokenizer(folder)
    ids = encode_chat(tokenizer, ChatTemplate(), [{"role": "user", "content": QUESTION}], True)
    for seed in range(100):  # one that ends early, but not at once
        tokens = model.generate(np.array([ids]), max_new_tokens=60, temperature=1.0, seed=seed)
        answer = tokens[0, len(ids) :].tolist()
        if tokenizer.eos_id in answer[3:-3] and tokenizer.eos_id not in answer[:3]:
            break
    answer = answer[: answer.index(tokenizer.eos_id)]
    options = ("--max_new_tokens=60", "--temperature=1.0", f"--seed={seed}")
    done = generate(folder, "--chat", f"--prompt={QUESTION}", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == tokenizer.decode(answer) + "\n"


@pytest.mark.slow
def test_a_conversation_keeps_what_was_said(folder):
    model, tokenizer = DeepSeekV3.from_pretrained(folder), load_run_tokenizer(folder)

    def answer(messages):
        ids = encode_chat(tokenizer, ChatTemplate(), messages, True)
        tokens = model.generate(np.array([ids]), max_new_tokens=8)[0, len(ids) :].tolist()
        ended = [*tokens, tokenizer.eos_id]
        return tokenizer.decode(ended[: ended.index(tokenizer.eos_id)])

    first = [{"role": "user", "content": "What is it?"}]
    second = first + [
        {"role": "assistant", "content": answer(first)},
        {"role": "user", "content": "Is it?"},
    ]
    expected = [answer(first), answer(second), answer(first)]
    options = ("--chat", "--max_new_tokens=8", "--context_tokens=128")
    too_long = "What is it? " * 40
    said = f"What is it?\n\n{too_long}\nIs it?\n/new\nWhat is it?\n"
    done = generate(folder, *options, said=said)
    assert done.returncode == 0 and done.stdout == "".join(f"{text}\n" for text in expected)
    assert done.stderr.count("error: ") == 1 and "/new" in done.stderr


def test_a_prompt_is_continued(folder):
    model, tokenizer = DeepSeekV3.from_pretrained(folder), load_run_tokenizer(folder)
    ids = [tokenizer.bos_id, *tokenizer.encode("It is")]
    tokens = model.generate(np.array([ids]), max_new_tokens=9)[0, 1:].tolist()
    done = generate(folder, "--prompt=It is", "--max_new_tokens=9")
    assert done.returncode == 0, done.stderr
    assert done.stdout == tokenizer.decode(tokens) + "\n"
    done = generate(folder, "--prompt=It is", "--max_new_tokens=9", "--dtype=bfloat16")
    assert done.returncode == 0 and done.stdout.startswith("It is"), done.stderr


def test_mistakes_are_one_line(folder, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('not for users') }}")
    for name in os.listdir(folder):
        os.link(folder / name, tmp_path / name)
    for arguments, told in (
        ((tmp_path, "--chat", "--prompt=a"), "cannot lay out these messages (not for users)"),
        ((tmp_path / "nowhere",), "nowhere"),
        ((folder, "--dtype=fp8"), "float32"),
    ):
        done = generate(*arguments)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not done.stdout

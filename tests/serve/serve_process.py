"""`python -m experiments.serve` as a process, on a model made for it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from flax import nnx

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.model.runtime import Runtime

ROOT = Path(__file__).parents[2]
KEY = "a-secret-of-the-test"
SMALL = ("--dtype=float32", "--cache_dtype=float32", "--page_tokens=8", "--prefill_chunk=8")


def save_folder(path):
    """A random model as a Hugging Face folder, wide awake: its logits are far from equal."""
    config = dataclasses.replace(
        configs.get("tiny").model, vocab_size=280, width=32, num_layers=2, init_std=0.3
    )
    model = DeepSeekV3(config, runtime=Runtime(), rngs=nnx.Rngs(0))
    tokenizer = train_tokenizer(["What is it? It is it.\n"], 280)
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    return model, tokenizer


def start(folder, *arguments):
    """A process with the key in its environment as SERVE_KEY."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "SERVE_KEY": KEY}
    command = [sys.executable, "-m", "experiments.serve", f"--checkpoint={folder}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)

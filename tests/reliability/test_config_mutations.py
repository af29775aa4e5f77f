"""Mistakes in a call, generated: each is one line with the key, before JAX is imported."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import _keys, load_config
from dsv3_jax.train.workdir import check_inputs, check_workdir
from dsv3_jax.validate import CHOICES

ROOT = Path(__file__).parents[2]
KEYS = dict(_keys(Config))
NUMBERS = [k for k, a in KEYS.items() if {int, float} & {a, *get_args(a)}]
WHOLE = [k for k in NUMBERS if int in {KEYS[k], *get_args(KEYS[k])}]
PATHS = ("data.prepared", "data.tokenizer", "checkpoint.initial_weights")


def typo(rng):
    key = rng.choice(list(KEYS))
    i = rng.randrange(len(key))
    changed = key[:i] + rng.choice(["", "_", "x", key[i] * 2]) + key[i + 1 :]
    return (f"{changed}=1", changed) if changed not in KEYS else typo(rng)


def wrong_type(rng):
    key = rng.choice([k for k in KEYS if KEYS[k] is bool or k in NUMBERS])
    return f"{key}={rng.choice(['', 'yes please', '[1]', '1,5', '0x', '½', chr(0)])}", key


def wrong_choice(rng):
    key = rng.choice([k for k in CHOICES if k in KEYS])
    return f"{key}={rng.choice(['', 'None!', CHOICES[key][0] + 's'])}", key


def negative(rng):
    key = rng.choice(NUMBERS)
    return f"{key}=-{rng.choice(['1', '7', '1e9'])}", key


def not_finite(rng):
    key = rng.choice(NUMBERS)
    return f"{key}={rng.choice(['nan', 'inf', '-inf', '1e999'])}", key


def huge(rng):
    key = rng.choice([k for k in WHOLE if k.startswith(("model.", "parallel.")) and k in LIMITED])
    return f"{key}={rng.choice(['1e9', '1e12', '9' * 40])}", key.rpartition(".")[2]


# Beyond these a model is no model and a mesh no mesh.
LIMITED = {
    *("model.vocab_size", "model.width", "model.num_layers", "model.expert_ffn_width"),
    *("model.num_heads", "model.kv_latent_dim", "model.num_experts", "model.v_head_dim"),
    *("model.experts_per_token", "model.num_groups", "model.num_groups_kept", "model.mtp_depth"),
    *("parallel.pipe", "parallel.data", "parallel.expert"),
}


def indivisible(rng):
    key, number = rng.choice(
        [("parallel.expert", 3), ("parallel.data", 5), ("parallel.data", 7), ("parallel.pipe", 3)]
        + [("model.num_groups", 3), ("model.num_experts", 9), ("model.qk_rope_head_dim", 15)]
        + [("data.sequences_per_step", 33), ("data.microbatch_sequences", 12)]
    )
    return f"{key}={number}", key.partition(".")[2]


def missing_file(rng):
    path = f"/absent/{rng.randrange(10**6)}"
    if rng.random() < 0.5:
        return f"{(key := rng.choice(PATHS))}={path}", key
    return f"data.sources={rng.choice(['jsonl', 'text', 'parquet', 'arrayrecord'])}:{path}", path


def unwritable(rng):
    path = rng.choice(["/proc/absent", "/dev/null/absent", "/sys/absent"])
    return f"data.cache_dir={path}", "data.cache_dir"


MUTATIONS = (typo, wrong_type, wrong_choice, negative, not_finite, huge, indivisible)
MUTATIONS += (missing_file, unwritable)


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_twenty_of_each_are_one_line_that_names_the_mistake(mutate, tmp_path):
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    for _ in range(20):
        override, named = mutate(rng)
        started = time.monotonic()
        with pytest.raises(UserError) as error:
            config = load_config("tiny", [override])
            check_workdir(config, tmp_path)
            check_inputs(config, tmp_path)
            pytest.fail(f"seed {seed}: accepted {override!r}")
        text = str(error.value)
        assert named in text and "\n" not in text and len(text) < 1500, (seed, override, text)
        assert time.monotonic() - started < 5


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_the_command_says_it_in_one_line_before_jax_is_imported(mutate, tmp_path):
    rng = random.Random(random.randrange(1 << 30))
    override = mutate(rng)[0].replace("\0", "?")  # no command line can hold a NUL
    assert_rejected(tmp_path, f"--set={override}")


@pytest.mark.parametrize(
    "argument", ["--workdir=/proc/absent", "--config=tinny", "--sett=run.seed=1", "run.seed=1"]
)
def test_wrong_flags(argument, tmp_path):
    assert_rejected(tmp_path, argument)


def assert_rejected(workdir, argument):
    """A module that stands in for JAX makes any use of it fail loudly."""
    (workdir / "fake").mkdir()
    (workdir / "fake/jax.py").write_text("raise SystemExit('JAX was imported')\n")
    path = os.pathsep.join([str(workdir / "fake"), str(ROOT)])
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.pretrain", f"--workdir={workdir / 'run'}", argument],
        env={**os.environ, "PYTHONPATH": path},
        cwd=workdir,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, (argument, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout and time.monotonic() - started < 5
    assert not (workdir / "run").exists()

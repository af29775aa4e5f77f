"""Killed between two saves and started again, every kind of run ends with the same bits.

Real processes of the real commands; losses are compared in hexadecimal, and with them a digest of
everything in the last checkpoint: weights, moments, bias, step, place in the data, references.
"""

import jax
import numpy as np
import pytest
from runs import losses, run

from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.reader import open_checkpoint

pytestmark = pytest.mark.slow
# Command and changes to `runs.SMALL`, by kind of run.
KINDS = {
    "moe": ("pretrain",),
    "separated documents, ema": (
        *("pretrain", "data.separate_documents=true", "optim.ema_decay=0.5"),
    ),
    "fp8": ("pretrain", "precision=fp8"),
    "pipeline": (
        *("pretrain", "parallel.pipe=2", "parallel.schedule=dualpipe", "model.num_layers=4"),
        *("data.sequences_per_step=8", "optim.total_tokens=1280"),
    ),
    "sft": ("sft", "data.sequence_length=32", "optim.total_tokens=1280"),
    "grpo": (
        *("grpo", "grpo.group_size=2", "grpo.max_answer_tokens=3", "grpo.reference_steps=3"),
        *("data.sequence_length=23", "optim.total_tokens=920"),
    ),
    "logits": ("distill_logits", "distill.top_k=9"),
}


def changes_of(kind, base):
    command, *changes = KINDS[kind]
    folder, chats = base
    if command != "pretrain":
        changes.append(f"checkpoint.initial_weights={folder}")
    if command == "sft":
        changes.append(f"sft.conversations={chats}")
    if command == "distill_logits":
        changes += [f"distill.teacher={folder}", f"sft.conversations={chats}",
                    "data.sequence_length=32", "optim.total_tokens=1280"]  # fmt: skip
    return command, changes


def digest(workdir):
    checkpoint = open_checkpoint(workdir / "checkpoints")
    template = {
        name: jax.ShapeDtypeStruct(array["shape"], np.dtype(array["dtype"]))
        for name, array in checkpoint.contents["arrays"].items()
    }
    extra = {k: v for k, v in checkpoint.extra.items() if k != "config"}
    return checkpoint.step, state_hash(checkpoint.restore(template)), extra


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_one_that_was_not(kind, base, tmp_path):
    command, changes = changes_of(kind, base)
    code, output = run(tmp_path / "whole", *changes, command=command)
    assert code == 0, output
    expected = losses(tmp_path / "whole")
    assert len(expected) == 10 and len(set(expected)) > 5
    killed = tmp_path / "killed"
    for step in (5, 8):  # saves are made after 2, 4, 6, ...: a step is lost each time
        fault = f"before_step@{step}=kill"
        code, output = run(killed, *changes, command=command, DSV3_FAULT=fault)
        assert code == -9, output
    code, output = run(killed, *changes, command=command)
    assert code == 0, output
    assert "continuing at step" in output
    assert losses(killed) == expected
    assert digest(killed) == digest(tmp_path / "whole")

"""The real runs, one after the other: fine-tuning on arithmetic, then GRPO on what came out."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from small_policy import MODEL, small_config

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.reader import open_checkpoint
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.posttrain import grpo_run
from dsv3_jax.posttrain.policy import load_task
from dsv3_jax.posttrain.problems import arithmetic_records
from dsv3_jax.posttrain.sft import load_data, with_length
from dsv3_jax.train.loop import train
from dsv3_jax.train.metrics import read_records

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with random weights and a tokenizer."""
    path = tmp_path_factory.mktemp("base") / "folder"
    model = DeepSeekV3(replace(MODEL, init_std=0.1), runtime=Runtime(), rngs=nnx.Rngs(0))
    tokenizer = train_tokenizer(["1+2=3 15-4=11 What is it?\n"], 300)
    model.save_pretrained(path, dtype="f32", tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """200 conversations, twice, in both forms, and two records that are none."""
    lines = []
    for i, record in enumerate(arithmetic_records() * 2):
        if i % 2:
            record = {"prompt": record["prompt"], "completion": record["answer"]}
        else:
            turns = zip(("user", "assistant"), record.values(), strict=True)
            record = {"messages": [{"role": r, "content": text} for r, text in turns]}
        lines.append(json.dumps(record))
    lines += ["{", json.dumps({"messages": []})]
    path = tmp_path_factory.mktemp("data") / "arithmetic.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def sft_config(base, conversations):
    return small_config(
        mesh=(2, 2),
        run={"name": "sft", "num_steps": None, "eval_interval": 10, "num_samples": 2,
             "sample_tokens": 4, "eval_batches": 2},
        model={"init_std": 0.1},
        optim={"schedule": "cosine", "peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 0},
        data={"sequence_length": 48, "sequences_per_step": 8, "validation_documents": 40,
              "microbatch_sequences": 4},
        checkpoint={"initial_weights": str(base), "interval_steps": 100},
        sft={"conversations": str(conversations)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def sft_run(sft_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sft") / "run"
    data = load_data(sft_config)
    assert len(data.train) == 360 and len(data.held_out) == 40
    assert data.failures == "not JSON 1, no assistant turn 1"
    assert train(with_length(sft_config, data), workdir, data) == 0
    return workdir


def weights(workdir):
    checkpoint = open_checkpoint(workdir / "checkpoints")
    template = {
        name: jax.ShapeDtypeStruct(array["shape"], array["dtype"])
        for name, array in checkpoint.contents["arrays"].items()
    }
    return checkpoint.step, checkpoint.restore(template)


def assert_same_weights(workdir, other):
    (step, got), (wanted_step, wanted) = weights(workdir), weights(other)
    assert step == wanted_step
    jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_fine_tuning_learns_and_continues_exactly(sft_config, sft_run, tmp_path):
    records = read_records(sft_run / "metrics.jsonl")
    losses = [r["validation_loss"] for r in records if "validation_loss" in r]
    assert losses[-1] < 0.6 * losses[0]
    assert (
        records[0]["learning_rate"] == pytest.approx(1e-2) and records[-1]["learning_rate"] < 2e-3
    )
    samples = read_records(sft_run / "samples.jsonl")
    assert len(samples) == 2 and set(samples[0]) == {"prompt", "text", "reference"}
    data = load_data(sft_config)
    config = with_length(sft_config, data)
    tokens = float(config.total_tokens)
    part = replace(
        config,
        run=replace(config.run, num_steps=5, num_samples=0),
        optim=replace(config.optim, total_tokens=tokens),
    )
    assert train(part, tmp_path / "run", data) == 0
    assert train(config, tmp_path / "run", load_data(sft_config)) == 0
    assert_same_weights(tmp_path / "run", sft_run)


def test_too_many_bad_records_stop_the_run(sft_config):
    strict = replace(sft_config, sft=replace(sft_config.sft, max_bad_fraction=0.004))
    with pytest.raises(UserError, match="402 records: 2 failed .* more than the 1 accepted"):
        load_data(strict)


@pytest.fixture(scope="module")
def grpo_config(sft_run):
    return small_config(
        mesh=(2, 2),
        run={"name": "grpo", "num_steps": 6, "eval_interval": 4, "num_samples": 2,
             "log_interval": 2},
        model={"init_std": 0.1},
        optim={"schedule": "cosine", "peak_lr": 1e-3, "final_lr": 1e-4, "warmup_steps": 0,
               "weight_decay": 0.0},
        data={"sequence_length": 15, "sequences_per_step": 16, "microbatch_sequences": 8,
              "validation_documents": 8},
        checkpoint={"initial_weights": str(sft_run), "interval_steps": 100},
        grpo={"group_size": 4, "updates_per_rollout": 2, "max_answer_tokens": 4,
              "reference_steps": 4, "routing_replay": True},
    )  # fmt: skip


def test_grpo_runs_and_continues_exactly(grpo_config, tmp_path, capsys):
    task = load_task(grpo_config)
    assert len(task.problems.held_out) == 8 and len(task.problems.train) == 192
    assert grpo_run.train(grpo_config, tmp_path / "whole", task) == 0
    assert "is answered with" in capsys.readouterr().out
    records = read_records(tmp_path / "whole" / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(6))
    for record in records:
        assert 0 <= record["reward"] <= 1 and 1 <= record["answer_tokens"] <= 4
        assert record["entropy"] > 0 and record["kl"] >= -1e-6
        evaluated = record["step"] in (0, 4, 5)
        assert ("validation_reward" in record) == evaluated
    # The first update of a round has the policy that sampled; the second one does not.
    assert [r["ratio"] for r in records[::2]] == pytest.approx([1.0] * 3, abs=1e-5)
    assert all(abs(r["ratio"] - 1) > 1e-6 for r in records[1::2])
    # The reference is replaced before step 4: nothing has moved from it yet.
    assert records[4]["kl"] == pytest.approx(0.0, abs=1e-6) and records[3]["kl"] > 1e-6
    samples = read_records(tmp_path / "whole" / "samples.jsonl")
    assert [s["step"] for s in samples] == [0, 0, 2, 2, 4, 4]

    optim = replace(grpo_config.optim, total_tokens=float(grpo_config.total_tokens))
    part = replace(grpo_config, run=replace(grpo_config.run, num_steps=2), optim=optim)
    assert grpo_run.train(part, tmp_path / "parts", task) == 0
    assert grpo_run.train(grpo_config, tmp_path / "parts", task) == 0
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    keys = {"reward", "loss_hex", "kl", "entropy"}
    again = read_records(tmp_path / "parts" / "metrics.jsonl")
    assert [{k: r[k] for k in keys} for r in again] == [{k: r[k] for k in keys} for r in records]


@pytest.mark.parametrize(
    "section, name, value, message",
    [
        ("grpo", "group_size", 5, "not whole groups of grpo.group_size=5"),
        ("grpo", "max_answer_tokens", 15, "no room for a prompt"),
        ("parallel", "pipe", 2, "set parallel.pipe=1"),
        ("parallel", "context", 2, "set parallel.context=1"),
        ("checkpoint", "initial_weights", "", "initial_weights is empty"),
        ("checkpoint", "max_lost_steps", 99, "the 100 steps between two saves"),
        ("run", "num_steps", None, "set a number"),
    ],
)
def test_mistakes_are_one_line(grpo_config, section, name, value, message):
    changed = replace(getattr(grpo_config, section), **{name: value})
    with pytest.raises(UserError, match=message) as error:
        grpo_run.check_config(replace(grpo_config, **{section: changed}))
    assert "\n" not in str(error.value)


def test_what_is_rewarded_becomes_frequent(grpo_config, tmp_path):
    """Four small digits or more are the best answer: short ones and others die out."""
    config = replace(
        grpo_config,
        run=replace(grpo_config.run, num_steps=30, eval_interval=100, num_samples=0),
        balance=replace(grpo_config.balance, sequence_weight=0.0),
        optim=replace(grpo_config.optim, peak_lr=5e-3, final_lr=1e-3),
        grpo=replace(grpo_config.grpo, updates_per_rollout=1, kl_weight=0.0),
    )

    def small_digits(prompt, answer, reference):
        return min(sum(character in "01234" for character in answer), 4) / 4

    task = replace(load_task(config), reward=small_digits)
    assert grpo_run.train(config, tmp_path / "run", task) == 0
    rewards = [r["reward"] for r in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert np.mean(rewards[-5:]) > np.mean(rewards[:3]) + 0.25, rewards

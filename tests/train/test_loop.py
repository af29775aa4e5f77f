"""The real loop: what it leaves behind, and that stopping and continuing changes no bit."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsv3_jax import DeepSeekV3, configs
from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.reader import open_checkpoint, steps_in
from dsv3_jax.config import Config, SourceConfig
from dsv3_jax.errors import UserError
from dsv3_jax.train import schedules
from dsv3_jax.train.loop import EXIT_STOPPED, train
from dsv3_jax.train.metrics import read_records
from dsv3_jax.train.progress import Reporter

STEPS = 7
KEYS = {
    "step", "tokens", "loss", "loss_hex", "loss_mtp", "loss_balance", "grad_norm", "learning_rate",
    "max_violation", "max_violation_layers", "tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def config(small_config, tmp_path_factory) -> Config:
    """Data 2 x expert 2, one micro-batch a step and then two, bfloat16, EMA on."""
    text = Path(json.__file__).parent  # a few source files
    tiny = configs.get("tiny")
    return replace(
        small_config,
        run=replace(
            tiny.run, num_steps=STEPS, eval_interval=4, eval_batches=2, log_interval=2,
            num_samples=1, sample_tokens=3,
        ),
        model=replace(small_config.model, vocab_size=300, num_layers=1, num_dense_layers=0),
        parallel=replace(tiny.parallel, data=2, expert=2),
        precision=replace(tiny.precision, remat="none"),
        optim=replace(tiny.optim, total_tokens=16.0 * 16 * STEPS, warmup_steps=3, ema_decay=0.5),
        data=replace(
            tiny.data,
            sources=(SourceConfig(kind="text", path=f"{text}/*.py"),),
            cache_dir=str(tmp_path_factory.mktemp("cache")),
            sequence_length=16,
            sequences_per_step=16,
            sequences_per_step_start=8,
            batch_ramp_fraction=0.3,
            microbatch_sequences=8,
            filter_quality=False,
            deduplicate=False,
            validation_documents=1,
        ),
        checkpoint=replace(tiny.checkpoint, interval_steps=2, keep=2),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(config, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(config, workdir) == 0
    return workdir


def contents(workdir: Path) -> tuple:
    """Everything the newest checkpoint holds: digest of the arrays, tokens, data position."""
    checkpoint = open_checkpoint(workdir / "checkpoints")
    template = {
        name: jax.ShapeDtypeStruct(array["shape"], array["dtype"])
        for name, array in checkpoint.contents["arrays"].items()
    }
    digest = state_hash(checkpoint.restore(template))
    position = [place["position"] for place in checkpoint.extra["data"]]
    return checkpoint.step, digest, checkpoint.extra["tokens"], position


def test_what_a_run_leaves_behind(config, whole_run):
    records = read_records(whole_run / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(STEPS))
    tokens = 0
    for record in records:
        evaluated = record["step"] in (0, 4, STEPS - 1)  # start, interval, end
        assert set(record) == KEYS | ({"validation_loss"} if evaluated else set())
        assert float.fromhex(record["loss_hex"]) == record["loss"]
        assert len(record["max_violation_layers"]) == 2  # one main MoE layer, one MTP
        assert record["tokens"] == tokens
        rate = schedules.learning_rate(config, record["step"], tokens)
        assert record["learning_rate"] == rate
        tokens += schedules.sequences_per_step(config, tokens) * 16
    assert schedules.sequences_per_step(config, 0) == 8  # the batch did grow
    assert schedules.sequences_per_step(config, tokens) == 16
    run = json.loads((whole_run / "run.json").read_text())
    assert run["config"]["model"]["vocab_size"] == 300
    assert run["mesh"] == {"pipe": 1, "data": 2, "expert": 2}
    assert run["versions"]["jax"] == jax.__version__
    assert steps_in(whole_run / "checkpoints") == [6, 7]
    assert contents(whole_run)[2] == tokens
    (sample,) = read_records(whole_run / "samples.jsonl")
    assert sample["prompt"] and set(sample) == {"prompt", "text"}
    loads = read_records(whole_run / "expert_load.jsonl")
    assert [r["step"] for r in loads] == [0, 4, STEPS - 1]
    for layer in loads[0]["load"]:
        assert sum(layer) == pytest.approx(config.model.num_experts, abs=1e-2)
    assert any((whole_run / "tensorboard").iterdir())
    assert (whole_run / "tokenizer.json").exists()


def test_stopping_and_continuing_changes_no_bit(config, whole_run, tmp_path, monkeypatch, capsys):
    """Stopped before step 3 by its number and before 6 by SIGINT, with other evaluation and save
    intervals, a profile and metrics of steps that were lost: the same numbers."""
    workdir = tmp_path / "run"
    part = replace(config, run=replace(config.run, num_steps=3, num_samples=0, eval_interval=100))
    assert train(part, workdir) == 0
    assert contents(workdir)[0] == 3

    with (workdir / "metrics.jsonl").open("a") as file:  # of steps after the checkpoint
        file.write('{"step": 3, "loss": 0}\n{"step": 4, "lo')
    step_done = Reporter.step_done

    def interrupting(self, record, *args):
        if record["step"] == 3:
            (workdir / "PROFILE").touch()
        if record["step"] == 4:  # read while step 5 runs
            signal.raise_signal(signal.SIGINT)
        step_done(self, record, *args)

    monkeypatch.setattr(Reporter, "step_done", interrupting)
    before = signal.getsignal(signal.SIGINT)
    rest = replace(
        config,
        run=replace(config.run, num_samples=0),
        checkpoint=replace(config.checkpoint, interval_steps=100),
    )
    assert train(rest, workdir) == EXIT_STOPPED
    assert signal.getsignal(signal.SIGINT) is before
    assert contents(workdir)[0] == 6
    assert list((workdir / "profile").rglob("*.xplane.pb"))
    monkeypatch.undo()
    assert train(rest, workdir) == 0

    assert contents(workdir) == contents(whole_run)
    records = {r["step"]: r for r in read_records(workdir / "metrics.jsonl")}
    expected = {r["step"]: r for r in read_records(whole_run / "metrics.jsonl")}
    assert list(records) == list(expected)  # each step once, in order
    for step in expected:
        for key in KEYS - {"tokens_per_second"}:
            assert records[step][key] == expected[step][key], (step, key)
    assert records[STEPS - 1]["validation_loss"] == expected[STEPS - 1]["validation_loss"]

    assert train(rest, workdir) == 0  # complete: nothing is trained, nothing lost
    assert contents(workdir) == contents(whole_run)
    assert len(read_records(workdir / "metrics.jsonl")) == STEPS


def test_another_model_needs_another_workdir(config, whole_run):
    other = replace(config, model=replace(config.model, dense_ffn_width=64))
    with pytest.raises(UserError, match="dense_ffn_width.*--workdir.*checkpoint.restore=false"):
        train(other, whole_run)


def test_starting_over_keeps_the_old_checkpoints(config, whole_run, tmp_path):
    workdir = tmp_path / "run"
    part = replace(
        config,
        run=replace(config.run, num_steps=2, num_samples=0),
        checkpoint=replace(config.checkpoint, restore=False),
    )
    assert train(part, workdir) == 0
    first = contents(workdir)
    assert train(part, workdir) == 0
    assert contents(workdir) == first  # the same run again
    assert steps_in(workdir / "checkpoints") == steps_in(workdir / "checkpoints.1") == [2]
    assert len(read_records(workdir / "metrics.jsonl")) == 2


def test_a_new_run_starts_from_the_weights_of_another(config, whole_run, tmp_path):
    """Straight from the run, and from a folder it was exported to: the same first evaluation."""
    DeepSeekV3.from_pretrained(whole_run).save_pretrained(tmp_path / "folder", dtype="f32")
    last = read_records(whole_run / "metrics.jsonl")[-1]["validation_loss"]
    for path in (whole_run, tmp_path / "folder"):
        checkpoint = replace(config.checkpoint, initial_weights=str(path))
        run = replace(config.run, num_steps=2)
        workdir = tmp_path / f"from_{path.name}"
        assert train(replace(config, checkpoint=checkpoint, run=run), workdir) == 0
        first = read_records(workdir / "metrics.jsonl")[0]
        assert first["step"] == first["tokens"] == 0
        other = read_records(whole_run / "metrics.jsonl")[0]["validation_loss"]
        assert abs(first["validation_loss"] - last) < 1e-6 < abs(other - last)


def test_weights_of_another_model_are_refused_before_any_work(config, whole_run, tmp_path):
    model = replace(config.model, num_groups_kept=3)
    checkpoint = replace(config.checkpoint, initial_weights=str(whole_run))
    with pytest.raises(UserError, match="num_groups_kept is 2 there and 3 here") as error:
        train(replace(config, model=model, checkpoint=checkpoint), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()

"""The training loop, top to bottom: data, workdir, state, steps, samples."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsv3_jax import faults
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import steps_in
from dsv3_jax.config import Config
from dsv3_jax.data import pipeline
from dsv3_jax.data.prepare import progress_bar
from dsv3_jax.overrides import to_dict
from dsv3_jax.parallel.mesh import batch_sharding, data_process, make_mesh
from dsv3_jax.train import recheck, schedules
from dsv3_jax.train.control import Profiler, stop_signals
from dsv3_jax.train.ema import HostEma, ema_template
from dsv3_jax.train.guards import REHEARSAL, Guard, SpikeWindow, leaf_names
from dsv3_jax.train.ledger import Ledger, account, summary
from dsv3_jax.train.losses import model_losses
from dsv3_jax.train.metrics import DispatchedStep, StepLog
from dsv3_jax.train.progress import Reporter, describe
from dsv3_jax.train.samples import SAMPLES_FILE
from dsv3_jax.train.saving import Saver
from dsv3_jax.train.source import CorpusData, Rows, TrainingData
from dsv3_jax.train.state import (
    TrainState,
    abstract_state,
    check_initial_weights,
    inference_graphdef,
    initial_state,
)
from dsv3_jax.train.step import make_eval_step, make_train_step
from dsv3_jax.train.watchdog import Watchdog
from dsv3_jax.train.workdir import CHECKPOINTS, check_workdir, open_workdir

EXIT_STOPPED = 75  # by a signal, after a committed save


def train(
    config: Config,
    workdir: Path,
    data: TrainingData | None = None,
    *,
    loss: Callable = model_losses,
    prepare: Callable[[dict[str, jax.Array]], dict[str, jax.Array]] = lambda batch: batch,
) -> int:
    """Trains `config` in `workdir`, continuing from its newest checkpoint that verifies.

    Args:
      data: what to train on; None: the corpus of `config.data`.
      loss: see `make_train_step`.
      prepare: what a step's [A, B, ...] arrays go through before the step.

    Returns:
      0 when the run is complete, 75 when SIGINT or SIGTERM stopped it and a checkpoint was saved,
      16 when a step computed twice differed, 17 when that happened in this run before.

    Raises:
      UserError: the mesh, the corpus or the directory does not allow the run, or steps were
        skipped in a row.
    """
    try:
        return _train(config, workdir, data, loss, prepare)
    except recheck.SilentCorruption as error:
        print(f"{error}; nothing was saved since", file=sys.stderr)
        return recheck.record(workdir, error)


def _train(
    config: Config,
    workdir: Path,
    data: TrainingData | None,
    loss: Callable,
    prepare: Callable,
) -> int:
    check_workdir(config, workdir)
    ledger = Ledger(workdir, writes=jax.process_index() == 0)
    if not steps_in(workdir / CHECKPOINTS):
        check_initial_weights(config)
    mesh = make_mesh(config.parallel)
    if data is None:
        with progress_bar() as progress:
            data = CorpusData(config, pipeline.prepare_corpus(config, progress=progress))
    rows = data.rows(*data_process(mesh))
    validation_batches = _validation_batches(config, data, mesh)
    if jax.process_index() == 0:
        open_workdir(config, workdir, mesh)
        data.save(workdir)
    reporter = Reporter(config, list(mesh.devices.flat))
    reporter.say(describe(config, mesh.devices.flat[0].device_kind))
    reporter.say(f"{'data':<12} {data}")

    manager = CheckpointManager(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        config_digest=hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest(),
    )
    with ledger.spent_on("restore"):
        graphdef, state, ema, extra = _restore_or_init(config, mesh, manager, rows)
    tokens = extra.get("tokens", 0)
    window = SpikeWindow(config.guard, extra.get("guard"))
    leaves = leaf_names(state.params)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    train_step = make_train_step(config, graphdef, shardings, loss)
    inference = inference_graphdef(config, mesh)
    eval_step = make_eval_step(inference)

    step = first_step = int(state.step)
    ledger.resumed(step)
    saver = Saver(manager, config.checkpoint, step, reporter.say)
    num_steps = step + schedules.remaining_steps(config, step, tokens)
    continuing = f", continuing at step {step}" if step else ""
    reporter.say(f"{'workdir':<12} {workdir}{continuing}")
    reporter.start(first_step, num_steps)
    log = StepLog(workdir, first_step, reporter, Guard(workdir, window, leaves))
    profiler = Profiler(workdir)
    watchdog = Watchdog(workdir, jax.process_index(), config.guard.hang_seconds)

    @contextmanager
    def paused(category: str) -> Iterator[None]:
        with log.paused(), watchdog.paused(), ledger.spent_on(category):
            yield

    def evaluate() -> float | None:
        losses = [eval_step(state.params, state.router_bias, b) for b in validation_batches]
        return float(np.mean(jax.device_get(losses))) if losses else None

    def save(write: Callable) -> None:
        tree = vars(state) | ({"ema": ema.value()} if ema else {})
        position = _of_all_processes(rows.get_state())
        extra = {"tokens": tokens, "data": position, "guard": window.state()}
        extra["config"] = to_dict(config)
        write(step, tree, extra)

    with stop_signals() as stop:
        sequences = 0
        ledger.enter("steps")
        while step < num_steps and not stop.before(step):
            faults.reach("before_step", step)
            validation_loss = None
            if step % config.run.eval_interval == 0:
                with paused("evaluate"):
                    validation_loss = evaluate()
            data_started = time.perf_counter()
            compiled_for, sequences = sequences, schedules.sequences_per_step(config, tokens)
            with ledger.spent_on("data"):
                batch = _next_batch(config, mesh, rows, sequences)
            inputs = prepare(batch)
            data_seconds = time.perf_counter() - data_started
            if step == first_step:
                reporter.say("compiling the training step ...")
            profiler.before_step()
            learning_rate = schedules.learning_rate(config, step, tokens)
            mtp_weight = schedules.mtp_weight(config, tokens)
            if fault := faults.reach("mtp_weight", step):
                mtp_weight = math.nan if fault == "nan" else 1e4
            scalars = (learning_rate, schedules.bias_speed(config, tokens), mtp_weight)
            scalars = [np.float32(x) for x in scalars]
            compiles = sequences != compiled_for
            with (
                watchdog.paused() if compiles else nullcontext(),
                ledger.spent_on("compile") if compiles else nullcontext(),
            ):
                rehearsed, limits = None, window.limits(step)
                every = config.guard.recheck_interval
                if every and step % every == 0:
                    state, rehearsed = train_step(state, inputs, *scalars, REHEARSAL)
                    if faults.reach("after_rehearsal", step):
                        state = replace(state, params=faults.flip_bit(state.params))
                state, metrics = train_step(state, inputs, *scalars, limits)
            if rehearsed:
                recheck.compare(step, rehearsed, metrics, leaves)
            if ema:
                ema.update(state.params)
            # The device is busy with this step while the host reads the metrics of the one before.
            dispatched = DispatchedStep(
                step=step,
                tokens=tokens,
                step_tokens=sequences * config.data.sequence_length,
                learning_rate=learning_rate,
                data_seconds=data_seconds,
                metrics=metrics,
                batch=batch,
                limits=limits,
                validation_loss=validation_loss,
                extra=saver.failed(),
            )
            log.dispatched(dispatched)
            watchdog.beat()
            profiler.after_step(metrics)
            step, tokens = step + 1, tokens + dispatched.step_tokens
            ledger.beat(step)
            if step < num_steps and saver.due(step % config.checkpoint.interval_steps == 0):
                with paused("save"):
                    save(saver.save)
            if step < num_steps and saver.must_wait(step):
                with paused("save"):
                    saver.wait(step, lambda: save(saver.save))
        with watchdog.paused():
            if step > first_step:
                if step == num_steps:
                    with ledger.spent_on("evaluate"):
                        log.flush(validation_loss=evaluate())
                with ledger.spent_on("save"):
                    save(saver.finish)
        ledger.enter("end")
        ledger.write()
    watchdog.close()
    profiler.close()
    manager.close()
    rows.close()
    log.close()
    if jax.process_index() == 0:
        reporter.say(f"{'time':<12} {summary(account(workdir))}")
    if step < num_steps:
        reporter.say(f"stopped before step {step}, checkpoint saved; the same command continues")
        return EXIT_STOPPED
    reporter.say(f"done: {step} steps, {tokens:,} tokens; checkpoint in {workdir / CHECKPOINTS}")
    if jax.process_count() == 1:
        model = nnx.merge(inference, state.params, state.router_bias)
        data.write_samples(model, workdir / SAMPLES_FILE, reporter.say)
    ledger.write()
    return 0


def _restore_or_init(
    config: Config, mesh: Mesh, manager: CheckpointManager, rows: Rows
) -> tuple[nnx.GraphDef, TrainState, HostEma | None, dict[str, Any]]:
    """The static model, the state, the EMA and what `save` kept; moves `rows` to its place."""
    graphdef, template = abstract_state(config, mesh)
    decay, restored = config.optim.ema_decay, None
    if config.checkpoint.restore:
        ema_tree = {"ema": ema_template(template.params)} if decay else {}
        restored = manager.restore(vars(template) | ema_tree)
    if restored is None:
        state = initial_state(config, mesh)
        return graphdef, state, HostEma(state.params, decay) if decay else None, {}
    tree, extra, _ = restored
    saved_ema = tree.pop("ema", None)
    state = TrainState(**tree)
    positions = extra["data"]
    rows.set_state(positions[min(jax.process_index(), len(positions) - 1)])
    ema = HostEma(state.params, decay) if decay else None
    if ema:
        ema.restore(saved_ema)
    return graphdef, state, ema, extra


def _next_batch(config: Config, mesh: Mesh, rows: Rows, sequences: int) -> dict[str, jax.Array]:
    """The next step's [A, B, T+1] arrays; every process brings its own rows."""
    _, process_count = data_process(mesh)
    own_rows = config.microbatch_sequences // process_count  # of each micro-batch
    batch = rows.next_rows(sequences // process_count)
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh, leading=1), x.reshape(-1, own_rows, x.shape[-1])
        )
        for name, x in batch.items()
    }


def _validation_batches(
    config: Config, data: TrainingData, mesh: Mesh
) -> list[dict[str, jax.Array]]:
    """`run.eval_batches` fixed [B, T+1] batches, none when nothing is held out."""
    count, size = config.run.eval_batches, config.microbatch_sequences
    rows = data.validation_rows(count * size) if count else None
    if rows is None:
        return []
    process_index, process_count = data_process(mesh)
    own = size // process_count
    first = own * process_index
    return [
        {
            name: jax.make_array_from_process_local_data(
                batch_sharding(mesh), x[start + first : start + first + own]
            )
            for name, x in rows.items()
        }
        for start in range(0, count * size, size)
    ]


def _of_all_processes(value: Any) -> list[Any]:
    """A JSON value of every process, in process order."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    texts = multihost_utils.process_allgather(np.pad(text, (0, length - len(text))))
    return [json.loads(bytes(row).rstrip(b"\0")) for row in texts]

"""The training loop, top to bottom: corpus, workdir, state, steps, samples."""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import steps_in
from dsv3_jax.config import Config
from dsv3_jax.data import pipeline
from dsv3_jax.data.prepare import progress_bar
from dsv3_jax.overrides import to_dict
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.train import schedules
from dsv3_jax.train.control import Profiler, stop_signals
from dsv3_jax.train.ema import HostEma, ema_template
from dsv3_jax.train.metrics import DispatchedStep, StepLog
from dsv3_jax.train.progress import Reporter, describe
from dsv3_jax.train.samples import SAMPLES_FILE, write_samples
from dsv3_jax.train.state import TrainState, abstract_state, check_initial_weights, initial_state
from dsv3_jax.train.step import make_eval_step, make_train_step
from dsv3_jax.train.workdir import CHECKPOINTS, TOKENIZER, check_workdir, open_workdir

EXIT_STOPPED = 75  # by a signal, after a committed save


def train(config: Config, workdir: Path) -> int:
    """Trains `config` in `workdir`, continuing from its newest checkpoint that verifies.

    Returns:
      0 when the run is complete, 75 when SIGINT or SIGTERM stopped it and a checkpoint was saved.

    Raises:
      UserError: the mesh, the corpus or the directory does not allow the run.
    """
    check_workdir(config, workdir)
    if not steps_in(workdir / CHECKPOINTS):
        check_initial_weights(config)
    mesh = make_mesh(config.parallel)
    with progress_bar() as progress:
        corpus = pipeline.prepare_corpus(config, progress=progress)
    rows = pipeline.train_iterator(
        config, corpus, process_index=jax.process_index(), process_count=jax.process_count()
    )
    validation_batches = _validation_batches(config, corpus, mesh)
    if jax.process_index() == 0:
        open_workdir(config, workdir, mesh)
        corpus.tokenizer.save(workdir / TOKENIZER)
    reporter = Reporter(config, list(mesh.devices.flat))
    reporter.say(describe(config, mesh.devices.flat[0].device_kind))
    reporter.say(f"{'corpus':<12} {corpus}")

    manager = CheckpointManager(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        config_digest=hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest(),
    )
    graphdef, state, ema, tokens = _restore_or_init(config, mesh, manager, rows)
    train_step = make_train_step(config, graphdef, jax.tree.map(lambda x: x.sharding, state))
    eval_step = make_eval_step(graphdef)

    step = first_step = int(state.step)
    num_steps = step + schedules.remaining_steps(config, step, tokens)
    continuing = f", continuing at step {step}" if step else ""
    reporter.say(f"{'workdir':<12} {workdir}{continuing}")
    reporter.start(first_step, num_steps)
    log = StepLog(workdir, first_step, reporter)
    profiler = Profiler(workdir)

    def evaluate() -> float | None:
        losses = [eval_step(state.params, state.router_bias, b) for b in validation_batches]
        return float(np.mean(jax.device_get(losses))) if losses else None

    def save(wait: bool = False) -> None:
        tree = vars(state) | ({"ema": ema.value()} if ema else {})
        position = _of_all_processes(rows.get_state())
        extra = {"tokens": tokens, "data": position, "config": to_dict(config)}
        manager.save(step, tree, extra, wait=wait)

    with stop_signals() as stop:
        while step < num_steps and not stop.is_set():
            validation_loss = None
            if step % config.run.eval_interval == 0:
                with log.paused():
                    validation_loss = evaluate()
            data_started = time.perf_counter()
            sequences = schedules.sequences_per_step(config, tokens)
            batch = _next_batch(config, mesh, rows, sequences)
            data_seconds = time.perf_counter() - data_started
            if step == first_step:
                reporter.say("compiling the training step ...")
            profiler.before_step()
            learning_rate = schedules.learning_rate(config, step, tokens)
            state, metrics = train_step(
                state,
                batch,
                np.float32(learning_rate),
                np.float32(schedules.bias_speed(config, tokens)),
                np.float32(schedules.mtp_weight(config, tokens)),
            )
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
                validation_loss=validation_loss,
            )
            log.dispatched(dispatched)
            profiler.after_step(metrics)
            step, tokens = step + 1, tokens + dispatched.step_tokens
            if step % config.checkpoint.interval_steps == 0 and step < num_steps:
                with log.paused():
                    save()
        if step > first_step:
            if step == num_steps:
                log.flush(validation_loss=evaluate())
            save(wait=True)
    profiler.close()
    manager.close()
    rows.close()
    log.close()
    if step < num_steps:
        reporter.say(f"stopped before step {step}, checkpoint saved; the same command continues")
        return EXIT_STOPPED
    reporter.say(f"done: {step} steps, {tokens:,} tokens; checkpoint in {workdir / CHECKPOINTS}")
    if jax.process_count() == 1:
        model = nnx.merge(graphdef, state.params, state.router_bias)
        write_samples(model, corpus, config, workdir / SAMPLES_FILE, reporter.say)
    return 0


def _restore_or_init(
    config: Config, mesh: Mesh, manager: CheckpointManager, rows: pipeline.RowIterator
) -> tuple[nnx.GraphDef, TrainState, HostEma | None, int]:
    """The static model, the state, the EMA and the tokens consumed; moves `rows` to its place."""
    graphdef, template = abstract_state(config, mesh)
    decay, restored = config.optim.ema_decay, None
    if config.checkpoint.restore:
        ema_tree = {"ema": ema_template(template.params)} if decay else {}
        restored = manager.restore(vars(template) | ema_tree)
    if restored is None:
        state = initial_state(config, mesh)
        return graphdef, state, HostEma(state.params, decay) if decay else None, 0
    tree, extra, _ = restored
    saved_ema = tree.pop("ema", None)
    state = TrainState(**tree)
    positions = extra["data"]
    rows.set_state(positions[min(jax.process_index(), len(positions) - 1)])
    ema = HostEma(state.params, decay) if decay else None
    if ema:
        ema.restore(saved_ema)
    return graphdef, state, ema, extra["tokens"]


def _next_batch(
    config: Config, mesh: Mesh, rows: pipeline.RowIterator, sequences: int
) -> dict[str, jax.Array]:
    """The next step's [A, B, T+1] arrays; every process brings its own rows."""
    own_rows = config.microbatch_sequences // jax.process_count()  # of each micro-batch
    batch = rows.next_rows(sequences // jax.process_count())
    return {
        name: jax.make_array_from_process_local_data(
            batch_sharding(mesh, leading=1), x.reshape(-1, own_rows, x.shape[-1])
        )
        for name, x in batch.items()
    }


def _validation_batches(
    config: Config, corpus: pipeline.Corpus, mesh: Mesh
) -> list[dict[str, jax.Array]]:
    """`run.eval_batches` fixed [B, T+1] batches, none when nothing is held out."""
    count, size = config.run.eval_batches, config.microbatch_sequences
    if not (count and config.data.validation_documents):
        return []
    rows = pipeline.validation_rows(config, corpus, count * size)  # the same on every process
    own = size // jax.process_count()
    first = own * jax.process_index()
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

"""The GRPO run: sample, reward, compare, update (spec §10.3), with the training step of `train/`.

A round samples G answers to each of some problems, rewards them, and makes
`grpo.updates_per_rollout` optimizer steps on them; evaluation, saving and stopping happen between
rounds. Rollouts and updates use the same arrays on one mesh.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax import faults
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import steps_in
from dsv3_jax.config import Config
from dsv3_jax.data.chat import save_chat_template
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import to_dict
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.posttrain.grpo import policy_losses
from dsv3_jax.posttrain.policy import Policy, Round, Task
from dsv3_jax.train import schedules
from dsv3_jax.train.control import stop_signals
from dsv3_jax.train.guards import Guard, SpikeWindow, leaf_names
from dsv3_jax.train.ledger import Ledger, account, summary
from dsv3_jax.train.loop import EXIT_STOPPED
from dsv3_jax.train.metrics import DispatchedStep, StepLog, read_records
from dsv3_jax.train.progress import Reporter, describe
from dsv3_jax.train.samples import SAMPLES_FILE
from dsv3_jax.train.saving import Saver
from dsv3_jax.train.state import (
    TrainState,
    abstract_state,
    check_initial_weights,
    initial_state,
)
from dsv3_jax.train.step import make_train_step
from dsv3_jax.train.workdir import CHECKPOINTS, TOKENIZER, check_workdir, open_workdir


def check_config(config: Config) -> None:
    """Raises UserError for what GRPO cannot run; needs no device."""
    data, grpo, parallel = config.data, config.grpo, config.parallel
    if not config.checkpoint.initial_weights:
        raise UserError(
            "checkpoint.initial_weights is empty; name the run or folder to start from, e.g. "
            "--set checkpoint.initial_weights=runs/tiny_sft"
        )
    if parallel.pipe > 1:
        raise UserError(f"parallel.pipe={parallel.pipe} does not sample; set parallel.pipe=1")
    if parallel.context > 1:
        raise UserError(
            f"parallel.context={parallel.context} does not sample; set parallel.context=1"
        )
    if config.run.num_steps is None:
        raise UserError("run.num_steps is none; GRPO has no end of its own: set a number")
    if config.model.num_dense_layers == config.model.num_layers:
        raise UserError("model.num_dense_layers leaves no MoE layer to GRPO; lower it")
    answers = data.sequences_per_step * grpo.updates_per_rollout
    if answers % grpo.group_size:
        raise UserError(
            f"data.sequences_per_step={data.sequences_per_step} x grpo.updates_per_rollout="
            f"{grpo.updates_per_rollout} answers are not whole groups of grpo.group_size="
            f"{grpo.group_size}; change one of them"
        )
    if config.optim.ema_decay:
        raise UserError(
            f"optim.ema_decay={config.optim.ema_decay} has no effect on GRPO; leave it out"
        )
    # Saves fall between rounds, so that many steps after the one before.
    between = -(-config.checkpoint.interval_steps // grpo.updates_per_rollout)
    between *= grpo.updates_per_rollout
    lost = config.checkpoint.max_lost_steps
    if lost is not None and lost < between:
        raise UserError(
            f"checkpoint.max_lost_steps={lost} is less than the {between} steps between two saves "
            f"(checkpoint.interval_steps={config.checkpoint.interval_steps} in whole rounds of "
            f"grpo.updates_per_rollout={grpo.updates_per_rollout}); raise it"
        )
    if grpo.group_size < 2:
        raise UserError(f"grpo.group_size={grpo.group_size} compares nothing; use 2 or more")
    if grpo.max_answer_tokens > data.sequence_length - 1:
        raise UserError(
            f"grpo.max_answer_tokens={grpo.max_answer_tokens} leaves no room for a prompt in "
            f"data.sequence_length={data.sequence_length}; change one of them"
        )


def train(config: Config, workdir: Path, task: Task) -> int:
    """Improves the policy of `checkpoint.initial_weights` by its rewards, in `workdir`.

    Continues from the newest checkpoint that verifies, with the same problems, seeds and reference
    policy as without the interruption.

    Returns:
      0 when the run is complete, 75 when SIGINT or SIGTERM stopped it and a checkpoint was saved.

    Raises:
      UserError: the mesh, the problems or the directory do not allow the run, or too many rewards
        failed.
    """
    check_config(config)
    check_workdir(config, workdir)
    ledger = Ledger(workdir, writes=True)
    if jax.process_count() > 1:
        raise UserError("GRPO samples in one process; start a single one for all devices")
    if not steps_in(workdir / CHECKPOINTS):
        check_initial_weights(config)
    mesh, grpo = make_mesh(config.parallel), config.grpo
    open_workdir(config, workdir, mesh)
    task.tokenizer.save(workdir / TOKENIZER)
    save_chat_template(task.template, workdir)
    reporter = Reporter(config, list(mesh.devices.flat))
    reporter.say(describe(config, mesh.devices.flat[0].device_kind))
    reporter.say(f"{'problems':<12} {task.problems}")
    manager = CheckpointManager(
        workdir / CHECKPOINTS,
        keep=config.checkpoint.keep,
        config_digest=hashlib.sha256(json.dumps(to_dict(config)).encode()).hexdigest(),
    )
    with ledger.spent_on("restore"):
        graphdef, state, reference, position = _restore_or_init(config, mesh, manager)
    train_step = make_train_step(
        config,
        graphdef,
        jax.tree.map(lambda x: x.sharding, state),
        loss=partial(policy_losses, config=grpo),
    )
    policy = Policy(config, task, mesh)
    step, num_steps = int(state.step), config.run.num_steps
    num_problems = config.data.sequences_per_step * grpo.updates_per_rollout // grpo.group_size
    first_step, saved_step = step, step
    ledger.resumed(step)
    saver = Saver(manager, config.checkpoint, step, reporter.say)
    reporter.say(f"{'workdir':<12} {workdir}{f', continuing at step {step}' if step else ''}")
    reporter.start(first_step, num_steps)
    guard = Guard(workdir, SpikeWindow(config.guard), leaf_names(state.params))
    log = StepLog(workdir, first_step, reporter, guard)
    shown = _SampleFile(workdir / SAMPLES_FILE, first_step, config.run.num_samples, reporter)

    @contextmanager
    def paused(category: str) -> Iterator[None]:
        with log.paused(), ledger.spent_on(category):
            yield

    def save(write: Callable) -> None:
        tree = vars(state) | {"reference": reference}
        tokens = step * config.tokens_per_step
        extra = {"tokens": tokens, "data": [vars(position)], "config": to_dict(config)}
        write(step, tree, extra)

    def evaluate() -> dict[str, float]:
        """Mean reward of greedy answers to the held-out problems."""
        if not task.problems.held_out:
            return {}
        asked = task.problems.held_out
        played = policy.judge(asked, policy.sample(state, asked, seed=0, greedy=True))
        return {"validation_reward": float(played.scores.values_N.mean())}

    with stop_signals() as stop, ledger.compilations_apart():
        ledger.enter("steps")
        while step < num_steps and not stop.before(step):
            extra = {}
            if _crossed(step, grpo.updates_per_rollout, config.run.eval_interval):
                with paused("evaluate"):
                    extra = evaluate()
            if step - position.reference_step >= grpo.reference_steps:
                reference = jax.tree.map(jnp.copy, state.params)
                position.reference_step = step
            problems = task.problems.batch(position.problems, num_problems, config.run.seed)
            position.problems += num_problems
            log.flush()  # answers need the weights of the last step: its end is no rollout time
            with ledger.spent_on("rollout"):
                rollouts = policy.sample(state, problems, seed=_seed(config.run.seed, step))
            with ledger.spent_on("reward"):
                played = policy.judge(problems, rollouts)
            shown.add(step, played, show=step % config.run.log_interval == 0)
            statistics = played.statistics(grpo.group_size)
            extra |= statistics
            for batch in policy.batches(state, reference, played):
                if step == num_steps:
                    break
                faults.reach("before_step", step)
                tokens = step * config.tokens_per_step
                learning_rate = schedules.learning_rate(config, step, tokens)
                state, metrics = train_step(
                    state,
                    batch,
                    np.float32(learning_rate),
                    np.float32(schedules.bias_speed(config, tokens)),
                    np.float32(0.0),
                )
                log.dispatched(
                    DispatchedStep(
                        step=step,
                        tokens=tokens,
                        step_tokens=config.tokens_per_step,
                        learning_rate=learning_rate,
                        data_seconds=0.0,
                        metrics=metrics,
                        batch=batch,
                        validation_loss=None,
                        extra=extra | saver.failed(),
                    )
                )
                step, extra = step + 1, statistics
                ledger.beat(step)
            at_interval = step - saved_step >= config.checkpoint.interval_steps
            if step < num_steps and saver.due(at_interval):
                with paused("save"):
                    save(saver.save)
                saved_step = step
            ahead = min(grpo.updates_per_rollout, num_steps - step)
            if ahead and saver.must_wait(step, ahead):
                with paused("save"):
                    saver.wait(step, lambda: save(saver.save), ahead)
        if step > first_step:
            if step == num_steps:
                with ledger.spent_on("evaluate"):
                    log.flush(extra=statistics | evaluate())
            with ledger.spent_on("save"):
                save(saver.finish)
        ledger.enter("end")
    manager.close()
    log.close()
    ledger.write()
    reporter.say(f"{'time':<12} {summary(account(workdir))}")
    if step < num_steps:
        reporter.say(f"stopped before step {step}, checkpoint saved; the same command continues")
        return EXIT_STOPPED
    reporter.say(f"done: {step} steps; checkpoint in {workdir / CHECKPOINTS}")
    return 0


@dataclass(kw_only=True)
class Position:
    """Where a run is, beside its arrays."""

    problems: int = 0  # taken so far
    reference_step: int = 0  # whose weights the reference policy has


def _restore_or_init(
    config: Config, mesh: Mesh, manager: CheckpointManager
) -> tuple[nnx.GraphDef, TrainState, Any, Position]:
    """The static model, the state, the reference policy's weights and the position."""
    graphdef, template = abstract_state(config, mesh)
    if config.checkpoint.restore:
        restored = manager.restore(vars(template) | {"reference": template.params})
        if restored is not None:
            tree, extra, _ = restored
            reference = tree.pop("reference")
            return graphdef, TrainState(**tree), reference, Position(**extra["data"][0])
    state = initial_state(config, mesh)
    # A copy: the step takes the state's own buffers.
    return graphdef, state, jax.tree.map(jnp.copy, state.params), Position()


def _crossed(step: int, rounds_of: int, interval: int) -> bool:
    """Whether a multiple of `interval` lies in the round of steps that begins at `step`."""
    return step // interval != (step - rounds_of) // interval


def _seed(run_seed: int, step: int) -> int:
    return int(np.random.SeedSequence([run_seed, step]).generate_state(1)[0])


class _SampleFile:
    """samples.jsonl: the first answers of every round, with what they were worth."""

    def __init__(self, path: Path, first_step: int, count: int, reporter: Reporter):
        """Records of steps that a continued run repeats are dropped."""
        kept = [record for record in read_records(path) if record["step"] < first_step]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._path, self._count, self._reporter = path, count, reporter

    def add(self, step: int, played: Round, *, show: bool) -> None:
        with self._path.open("a") as file:
            for i in range(min(self._count, len(played.texts))):
                problem, reward = played.problems[i], float(played.scores.values_N[i])
                record = {
                    "step": step,
                    "prompt": list(problem.messages),
                    "text": played.texts[i],
                    "reward": reward,
                    "reference": problem.reference,
                    "finish_reason": played.rollouts[i].finish_reason,
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                if show:
                    question = problem.messages[-1].get("content")
                    self._reporter.say(
                        f"--- sample: {question!r} is answered with {played.texts[i]!r}, "
                        f"reward {reward:g}"
                    )

"""What a run leaves behind step by step: metrics.jsonl, expert_load.jsonl and TensorBoard files.

Step s is counted from 0. Its record holds the loss of batch s under the weights before update s,
the tokens consumed before it (the index of the schedules), and on evaluation steps the validation
loss of those same weights. The last step's `validation_loss` is that of the final weights.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from dsv3_jax.errors import UserError
from dsv3_jax.train.guards import NO_LIMITS, Guard
from dsv3_jax.train.progress import Reporter

METRICS_FILE = "metrics.jsonl"
EXPERT_LOAD_FILE = "expert_load.jsonl"


@dataclass(frozen=True, kw_only=True)
class DispatchedStep:
    """A step that the device may still be computing."""

    step: int
    tokens: int  # consumed before it
    step_tokens: int
    learning_rate: float
    data_seconds: float  # the host waited for its batch
    metrics: dict[str, Any]
    batch: dict[str, jax.Array]
    validation_loss: float | None
    extra: Mapping[str, float] = field(default_factory=dict)  # of the host, for the record
    limits: np.ndarray = field(default_factory=NO_LIMITS.copy)  # it was held to


def make_record(
    done: DispatchedStep, metrics: dict[str, Any], tokens_per_second: float
) -> dict[str, Any]:
    """One object of metrics.jsonl. `loss_hex` has every bit of the float32 loss."""
    loss = float(metrics["loss"])
    layers = [float(x) for x in metrics["max_violation"]]
    record = {
        "step": done.step,
        "tokens": done.tokens,
        "loss": loss,
        "loss_hex": loss.hex(),
        "loss_mtp": float(metrics["loss_mtp"]),
        "loss_balance": float(metrics["loss_balance"]),
        "grad_norm": float(metrics["grad_norm"]),
        "learning_rate": done.learning_rate,
        "max_violation": float(np.mean(layers)) if layers else 0.0,
        "max_violation_layers": layers,
        "tokens_per_second": tokens_per_second,
    }
    record |= {name: float(value) for name, value in metrics["extra"].items()} | done.extra
    if done.validation_loss is not None:
        record["validation_loss"] = done.validation_loss
    return record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a jsonl file, without a last line that a crash cut short."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # a complete line ends in a newline
    return [json.loads(line) for line in lines]


class MetricsWriter:
    """Appends records; on a resumed run the records of the steps to be repeated are dropped."""

    def __init__(self, workdir: Path, first_step: int):
        """`first_step` is the first step that will be written: 0, or the restored one."""
        self._files = {}
        for name in (METRICS_FILE, EXPERT_LOAD_FILE):
            path = workdir / name
            kept = [r for r in read_records(path) if r["step"] < first_step]
            rewritten = path.with_suffix(".tmp")  # renamed, so that a crash loses no record
            rewritten.write_text("".join(json.dumps(record) + "\n" for record in kept))
            rewritten.replace(path)
            self._files[name] = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def write(self, record: dict[str, Any], counts_LE: np.ndarray) -> None:
        """Writes a record and, on evaluation steps, each expert's load over the mean load."""
        self._append(METRICS_FILE, record)
        for key, value in record.items():
            if isinstance(value, int | float) and key != "step":
                self._board.add_scalar(key, value, record["step"])
        for layer, violation in enumerate(record["max_violation_layers"]):
            self._board.add_scalar(f"max_violation/layer_{layer}", violation, record["step"])
        if "validation_loss" in record:
            load_LE = counts_LE / counts_LE.mean(-1, keepdims=True)
            load = np.round(load_LE, 4).tolist()
            self._append(EXPERT_LOAD_FILE, {"step": record["step"], "load": load})

    def _append(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._files[name].write(json.dumps(record) + "\n")
            self._files[name].flush()
        except OSError as error:
            raise UserError(
                f"{self._files[name].name} cannot be written ({error.strerror}); mend that and run "
                f"again: it continues from the last checkpoint"
            ) from None

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._board.close()


class StepLog:
    """Reads each step's metrics once the next one is dispatched, and hands them to the writers.

    Every process reads; process 0 writes and shows.
    """

    def __init__(self, workdir: Path, first_step: int, reporter: Reporter, guard: Guard):
        self._reporter, self._guard = reporter, guard
        self._writer = MetricsWriter(workdir, first_step) if jax.process_index() == 0 else None
        self._pending: DispatchedStep | None = None
        self._clock = time.perf_counter()

    def dispatched(self, step: DispatchedStep) -> None:
        """Takes a step just dispatched; waits for the one before it and writes its record."""
        self.flush()
        self._pending = step

    def flush(self, **changes: Any) -> None:
        """Waits for the last step and writes its record, `changes` replacing its fields."""
        if self._pending is None:
            return
        done, self._pending = replace(self._pending, **changes), None
        metrics = jax.device_get(done.metrics)
        if metrics["overflow"] > 0:
            raise UserError(
                f"step {done.step}: {metrics['overflow']:.0f} rows and pairs found no room at "
                f"their experts; raise parallel.buffer_factor (or leave it out) and run again: "
                f"it continues from the last checkpoint"
            )
        now = time.perf_counter()
        seconds, self._clock = now - self._clock, now
        record = make_record(done, metrics, done.step_tokens / seconds)
        if skipped := self._guard.saw(done.step, metrics, done.limits, done.batch):
            record["skipped"] = True
            self._reporter.say(skipped)
        if self._writer:
            self._writer.write(record, metrics["counts"])
            self._reporter.step_done(record, seconds, done.data_seconds)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For evaluations and saves: writes the last step first; the time inside is not counted."""
        self.flush()
        yield
        self._clock = time.perf_counter()

    def close(self) -> None:
        self.flush()
        if self._writer:
            self._writer.close()
        self._reporter.close()

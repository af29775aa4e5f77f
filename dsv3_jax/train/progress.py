"""What the person at the console sees: the run at a glance, then a line an interval."""

from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dsv3_jax.config import Config
from dsv3_jax.parallel.mesh import axis_sizes
from dsv3_jax.plan.flops import flops_per_token
from dsv3_jax.plan.memory import CATEGORIES, device_memory
from dsv3_jax.plan.parameters import count_parameters
from dsv3_jax.train import schedules

# Dense bfloat16 FLOP/s of a device, by the start of its `device_kind`; the longest match counts.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H800": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2450e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak of a device kind, or None when it is not known."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else None


def describe(config: Config, device_kind: str) -> str:
    """The block shown before step 1 and by `--dry_run`. Needs no device."""
    model, parallel, data = config.model, config.parallel, config.data
    counts = count_parameters(model)
    flops = flops_per_token(model, data.sequence_length)
    memory = device_memory(config)
    devices = parallel.num_devices
    axes = " x ".join(f"{name} {size}" for name, size in axis_sizes(parallel).items())
    mtp = ""
    if model.mtp_depth:
        with_mtp = flops_per_token(model, data.sequence_length, include_mtp=True)
        mtp = f", {_si(with_mtp)}FLOP with MTP"
    steps = schedules.remaining_steps(config, 0, 0)
    ramp = ""
    if data.sequences_per_step_start is not None:
        ramp = f" (from {data.sequences_per_step_start:,} sequences at the start)"
    rows = {
        "run": config.run.name,
        "parameters": f"{counts.total:,} total, {counts.activated:,} active a token"
        + (f", {counts.mtp_unique:,} more in MTP" if model.mtp_depth else ""),
        "compute": f"{_si(flops)}FLOP a token, forward and backward{mtp}",
        "memory": f"about {_bytes(memory.total)} a device: "
        + ", ".join(
            f"{label} {_bytes(size)}"
            for name, label in CATEGORIES.items()
            if (size := getattr(memory, name))
        ),
        "mesh": f"{axes} = {devices} {device_kind} device{'s' if devices > 1 else ''}, "
        f"layout {parallel.layout}, {parallel.dispatch} dispatch, {config.precision.compute}",
        "batch": f"{data.sequences_per_step:,} sequences x {data.sequence_length:,} = "
        f"{config.tokens_per_step:,} tokens a step, "
        f"{data.sequences_per_step // config.microbatch_sequences} micro-batch(es){ramp}",
        "length": f"{steps:,} steps",
    }
    return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


class Reporter:
    """A progress bar where there is a terminal, and one plain line an interval everywhere."""

    def __init__(self, config: Config, devices: list[jax.Device]):
        self._config = config
        self._num_devices, self._peak = len(devices), peak_flops(devices[0].device_kind)
        self._device = devices[0]
        self._flops = flops_per_token(config.model, config.data.sequence_length, include_mtp=True)
        self._steps_timed, self._average_seconds = 0, 0.0
        self._console = Console(highlight=False, soft_wrap=True, quiet=jax.process_index() > 0)
        self._num_steps = 0
        self._bar: Progress | None = None

    def say(self, text: str) -> None:
        """Shows lines of text."""
        self._console.print(text, markup=False)

    def start(self, first_step: int, num_steps: int) -> None:
        """`num_steps` counts the whole run, the steps before `first_step` included."""
        self._num_steps = num_steps
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=first_step)
            self._bar.start()

    def step_done(self, record: dict[str, Any], seconds: float, data_seconds: float) -> None:
        """Shows a step's record; `seconds` it took, `data_seconds` of them waiting for data."""
        step = record["step"]
        eta = self._eta(step, seconds)
        if self._bar:
            self._bar.update(
                self._task, completed=step + 1, description=f"loss {record['loss']:.4f} {eta}"
            )
        validation = record.get("validation_loss")
        last = step + 1 == self._num_steps
        if validation is None and step % self._config.run.log_interval and not last:
            return
        speed = record["tokens_per_second"] / self._num_devices
        achieved = speed * self._flops
        parts = [
            f"step {step}/{self._num_steps}",
            f"loss {record['loss']:.4f}",
            f"mtp {record['loss_mtp']:.4f}" if self._config.model.mtp_depth else "",
            f"balance {record['loss_balance']:.2e}",
            f"reward {record['reward']:.3f}" if "reward" in record else "",
            f"grad {record['grad_norm']:.3f}",
            f"lr {record['learning_rate']:.2e}",
            f"{record['tokens_per_second']:,.0f} tok/s",
            f"{speed:,.0f} tok/s/device",
            f"{achieved / 1e12:.3g} TFLOP/s/device",
            f"MFU {100 * achieved / self._peak:.1f}%" if self._peak else "",
            f"MaxVio {record['max_violation']:.2f}",
            self._memory(),
            f"data wait {100 * data_seconds / seconds:.0f}%",
            eta,
            "" if validation is None else f"validation loss {validation:.4f}",
        ]
        self.say("  ".join(part for part in parts if part))

    def _eta(self, step: int, seconds: float) -> str:
        """Time left, from a moving average that leaves out the first step with its compilation."""
        self._steps_timed += 1
        if self._steps_timed == 1:
            return ""
        average = seconds if self._steps_timed == 2 else self._average_seconds
        self._average_seconds = 0.9 * average + 0.1 * seconds
        return f"ETA {_duration(self._average_seconds * (self._num_steps - step - 1))}"

    def _memory(self) -> str:
        stats = self._device.memory_stats() or {}
        if "bytes_limit" not in stats:
            return ""
        return f"memory peak {100 * stats['peak_bytes_in_use'] / stats['bytes_limit']:.0f}%"

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def _si(value: float) -> str:
    """1.23e9 -> '1.23 G'."""
    for unit in ("", "k", "M", "G", "T"):
        if value < 1000 or unit == "T":
            return f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError(value)


def _bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d " * (days > 0) + f"{hours}:{minutes:02}:{seconds:02}"

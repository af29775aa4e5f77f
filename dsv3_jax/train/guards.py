"""Steps that must not reach the weights: numbers that are not finite, and spikes.

The decision falls inside the compiled step, on every device alike and without a wait of the host
(step.py); here is what the host knows: the limits a step may not exceed, and what is kept of a
step that did. A skipped step consumes its batch; weights, moments and router bias keep every bit.
"""

import json
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax.config import GuardConfig
from dsv3_jax.errors import UserError

# [loss, gradient norm] that a step may have. Of `REHEARSAL` nothing changes, not even the count of
# steps: the metrics say what the step would have been.
NO_LIMITS = np.full(2, np.inf, np.float32)
REHEARSAL = np.full(2, -np.inf, np.float32)

SKIPPED = "skipped"  # folder of a run: a report and the batch of each skipped step
_LEAST_STEPS = 32  # before a spike can be told from noise
# A spike is no less than this: a small model that suddenly learns has ten times the norm for some
# steps, which the clip takes care of; what diverges has a hundred times.
_NORM_RATIOS = 20.0, 40.0  # over the window's geometric mean; more is one whatever the deviation
_LEAST_LOSS_RISE = 0.5  # nats over the window's mean, and no less than that mean
_MOST_IN_A_ROW = 3


class SpikeWindow:
    """The last accepted steps, and how far from them a step may be."""

    def __init__(self, config: GuardConfig, saved: list[list[float]] | None = None):
        """`saved` is what `state` returned."""
        self._config = config
        self._steps = deque(map(tuple, saved or []), maxlen=config.window + 2)

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        self._steps.append((step, loss, grad_norm))

    def state(self) -> list[list[float]]:
        """JSON: [step, loss, gradient norm] of each."""
        return [list(entry) for entry in self._steps]

    def limits(self, step: int) -> np.ndarray:
        """[loss, gradient norm] float32: mean plus `sigmas` deviations over the window.

        Norms are compared by their logarithms. Only steps up to `step - 2` count: those whose
        metrics the host has read when it dispatches `step`, so that a continued run, which knows
        one more, decides the same.
        """
        known = [entry for entry in self._steps if entry[0] <= step - 2][-self._config.window :]
        if self._config.sigmas == 0 or len(known) < min(_LEAST_STEPS, self._config.window):
            return NO_LIMITS
        losses = np.array([entry[1] for entry in known], np.float64)
        norms = np.log(np.maximum([entry[2] for entry in known], 1e-30))
        rise = max(self._config.sigmas * losses.std(), _LEAST_LOSS_RISE, abs(losses.mean()))
        ratio = np.clip(self._config.sigmas * norms.std(), *np.log(_NORM_RATIOS))
        return np.array([losses.mean() + rise, math.exp(norms.mean() + ratio)], np.float32)


@dataclass
class Guard:
    """What the host does about the steps that the device accepted or skipped."""

    workdir: Path
    window: SpikeWindow
    leaves: list[str]  # names, in the order of the metrics' `leaf_norms`
    in_a_row: int = 0

    def saw(
        self, step: int, metrics: dict[str, Any], limits: np.ndarray, batch: dict[str, jax.Array]
    ) -> str | None:
        """Takes a finished step. Returns a line for the console if it was skipped.

        Raises:
          UserError: so many in a row were skipped that going on is of no use.
        """
        loss, grad_norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if metrics["accepted"]:
            self.window.add(step, loss, grad_norm)
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        broken = [
            name
            for name, norm in zip(self.leaves, metrics["leaf_norms"], strict=True)
            if not np.isfinite(norm)
        ]
        where = f"; not finite in {', '.join(broken[:3])}" if broken else ""
        where += f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        reason = (
            f"loss {loss:.4g} (limit {limits[0]:.4g}), gradient norm {grad_norm:.4g} "
            f"(limit {limits[1]:.4g}){where}"
        )
        report = self._keep(step, metrics, reason, batch)
        if self.in_a_row >= _MOST_IN_A_ROW:
            raise UserError(
                f"{self.in_a_row} steps in a row were skipped, the last for {reason}; see "
                f"{report.parent}, then run again to continue from the last checkpoint, with other "
                f"data (data.seed) or a lower optim.peak_lr"
            )
        return f"step {step} was skipped: {reason}; its batch is in {report.parent}"

    def _keep(self, step: int, metrics: dict[str, Any], reason: str, batch: dict) -> Path:
        """Every process keeps its own rows."""
        folder = self.workdir / SKIPPED
        folder.mkdir(exist_ok=True)
        norms = zip(self.leaves, map(float, metrics["leaf_norms"]), strict=True)
        report = folder / f"step_{step}.json"
        if jax.process_index() == 0:
            text = {"step": step, "reason": reason, "gradient_norms": dict(norms)}
            report.write_text(json.dumps(text, indent=2) + "\n")
        own = {
            f"{name}_{i}": np.asarray(shard.data)
            for name, array in batch.items()
            for i, shard in enumerate(array.addressable_shards)
            if shard.replica_id == 0
        }
        np.savez(folder / f"step_{step}_process_{jax.process_index()}.npz", **own)
        return report


def leaf_names(tree: Any) -> list[str]:
    """`moe_blocks.attn.wq_a.kernel` and so on, in the order of the tree's leaves."""
    return [
        ".".join(str(key.key) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]

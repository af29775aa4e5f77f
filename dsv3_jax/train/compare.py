"""How far one run's training loss is from another's: the measure of spec §5.7."""

from collections.abc import Sequence

import numpy as np

DECAY = 0.9


def smoothed(losses: Sequence[float]) -> np.ndarray:
    """The exponential moving average of a loss curve, starting from its first loss."""
    average, averages = losses[0], []
    for loss in losses:
        average = DECAY * average + (1 - DECAY) * loss
        averages.append(average)
    return np.array(averages)


def relative_gaps(losses: Sequence[float], baseline: Sequence[float]) -> np.ndarray:
    """Smoothed losses over the smoothed baseline, minus 1, step by step: above 0 is worse.

    Args:
      losses, baseline: one a step, of runs with the same seed and data order.
    """
    return smoothed(losses) / smoothed(baseline) - 1

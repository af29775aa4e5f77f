"""Goodput of a long run: useful time over wall time, with failures, stragglers and checkpoints.

A synchronous step needs every chip, so any failure stops the whole run, and every step waits for
the slowest node. `simulate` plays a run failure by failure; `expected_goodput` and `daly_interval`
are the closed forms that it must meet where they apply (exponential failures, no stragglers).
"""

import math
from dataclasses import dataclass

import numpy as np

from dsv3_jax.errors import UserError

# Interruptions that nobody planned: 419 in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783 §3.3.4
# and table 5), one in 50,677 hours of a GPU with its share of the host, network and software.
LLAMA3_MTBF_HOURS = 16_384 * 54 * 24 / 419

_MAY_BE_ZERO = (
    "detect_seconds", "reschedule_seconds", "restore_seconds", "recompile_seconds",
    "slow_fraction", "slow_excess",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Chips, how they fail, and what a checkpoint and a restart take. Times in seconds.

    Only `mtbf_hours` is published; every other default is our choice, to be replaced by what the
    cluster at hand measures.
    """

    chips: int
    mtbf_hours: float = LLAMA3_MTBF_HOURS  # of one chip, everything that stops a run included
    chips_per_node: int = 8
    # A save holds the step back until the state is in host memory; writing goes on behind it.
    blocking_seconds: float = 5.0
    save_seconds: float = 60.0  # from the start of a save until it is committed
    # A restart. JAX notices a lost process after 100 s without its heartbeat.
    detect_seconds: float = 100.0
    reschedule_seconds: float = 120.0
    restore_seconds: float = 120.0
    recompile_seconds: float = 20.0  # with a persistent compilation cache
    # Slow nodes, drawn anew at every restart: a node is slow with this probability, and then its
    # steps take 1 + Exponential(slow_excess) times as long. The fraction is of those that stay,
    # after the monitor has replaced most.
    slow_fraction: float = 1e-4
    slow_excess: float = 0.1

    def __post_init__(self):
        for name, value in vars(self).items():
            if not (0 < value < math.inf or (value == 0 and name in _MAY_BE_ZERO)):
                bound = "at least 0" if name in _MAY_BE_ZERO else "above 0"
                raise UserError(f"{name}={value} must be {bound} and finite")
        if self.blocking_seconds > self.save_seconds:
            raise UserError(
                f"blocking_seconds={self.blocking_seconds} exceeds save_seconds="
                f"{self.save_seconds}, of which it is a part; lower it"
            )
        if self.slow_fraction > 1:
            raise UserError(f"slow_fraction={self.slow_fraction} must lie in [0, 1]")

    @property
    def mtbf_seconds(self) -> float:
        """Mean time between failures of the whole run."""
        return self.mtbf_hours * 3600 / self.chips

    @property
    def behind_seconds(self) -> float:
        """How long a save is written while steps go on."""
        return self.save_seconds - self.blocking_seconds

    @property
    def restart_seconds(self) -> float:
        return (
            self.detect_seconds
            + self.reschedule_seconds
            + self.restore_seconds
            + self.recompile_seconds
        )


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """Shares of wall time; the five add up to 1."""

    useful: float  # the goodput: steps that a checkpoint kept, at the speed without slow nodes
    straggling: float  # what those steps took longer
    saving: float  # held back by saves that were kept
    lost: float  # since the last committed save, when a failure came
    restarting: float
    useful_error: float  # standard error of `useful`


@dataclass(frozen=True, kw_only=True)
class History:
    """A long run's failures, whatever its checkpoints: one element a failure, in seconds."""

    uptimes: np.ndarray  # from the first step after a restart to the failure
    slowdowns: np.ndarray  # how many times as long steps took meanwhile
    restarts: np.ndarray  # from the failure to the next step


def draw_history(cluster: Cluster, *, num_failures: int = 200_000, seed: int = 0) -> History:
    """Draws `num_failures` failures; errors of what is simulated with them fall with its root."""
    generator = np.random.default_rng(seed)
    return History(
        uptimes=generator.exponential(cluster.mtbf_seconds, num_failures),
        slowdowns=_slowdowns(cluster, generator, num_failures),
        restarts=_restart_times(cluster, generator, num_failures),
    )


def simulate(cluster: Cluster, history: History, interval: float) -> Goodput:
    """Plays a history with a save after every `interval` seconds of steps.

    Args:
      interval: seconds that the steps between two saves take without slow nodes, above 0.
    """
    slowdowns, steps = history.slowdowns, interval * history.slowdowns
    # A save starts when its steps are done and, at the earliest, when the one before is committed.
    periods = np.maximum(steps + cluster.blocking_seconds, cluster.save_seconds)
    kept = np.floor(np.maximum(history.uptimes - cluster.behind_seconds, 0) / periods)
    useful = kept * interval
    wall = history.uptimes + history.restarts
    total = wall.sum()
    share = useful.sum() / total
    return Goodput(
        useful=float(share),
        straggling=float((useful * (slowdowns - 1)).sum() / total),
        saving=float((kept * (periods - steps)).sum() / total),
        lost=float((history.uptimes - kept * periods).sum() / total),
        restarting=float(history.restarts.sum() / total),
        useful_error=float(np.sqrt(np.square(useful - share * wall).sum()) / total),
    )


def best_interval(cluster: Cluster, history: History) -> float:
    """The interval of the highest simulated goodput, in seconds, by a coarse and a fine search.

    The fine search fits a cubic in log(interval) to 41 simulations around the best of the coarse
    one: near its maximum the curve is flatter than the noise of any single simulation. Intervals
    that end before the last save is committed are left out: they wait for it, so longer ones win.
    """

    def goodputs(intervals: np.ndarray) -> list[float]:
        return [simulate(cluster, history, interval).useful for interval in intervals]

    mtbf, shortest = cluster.mtbf_seconds, cluster.behind_seconds
    coarse = np.geomspace(max(mtbf / 1e4, shortest), 2 * max(mtbf, shortest), 31)
    center = coarse[np.argmax(goodputs(coarse))]
    logs = np.linspace(np.log(max(center / 1.8, shortest)), np.log(center * 1.8), 41)
    fit = np.polynomial.Polynomial.fit(logs, goodputs(np.exp(logs)), 3)
    fine = np.linspace(logs[0], logs[-1], 4001)
    return float(np.exp(fine[np.argmax(fit(fine))]))


def young_interval(cluster: Cluster) -> float:
    """sqrt(2 C M), seconds between saves: Young's first-order optimum (CACM 17(9), 1974)."""
    return math.sqrt(2 * cluster.blocking_seconds * cluster.mtbf_seconds)


def daly_interval(cluster: Cluster) -> float:
    """Daly's higher-order optimum (FGCS 22(3), 2006, eq. 37), seconds between saves.

    It counts the save's blocking part only: restarts and the part written behind the steps scale
    the goodput of every interval alike (see `expected_goodput`).
    """
    cost, mtbf = cluster.blocking_seconds, cluster.mtbf_seconds
    if cost >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(cost / (2 * mtbf))
    return young_interval(cluster) * (1 + ratio / 3 + ratio**2 / 9) - cost


def expected_goodput(cluster: Cluster, interval: float) -> float:
    """Daly's complete model: exact for exponential failures and no slow nodes.

    M uptime and its restart, attempts that fail included, take M exp(R/M); the periods of T + C
    seconds that end, and are committed A - C later, before a failure number
    exp(-(A-C)/M) / (exp((T+C)/M) - 1). A is `save_seconds`, C its blocking part, R the restart,
    T the interval. T + C must be at least A, else saves wait for each other.
    """
    mtbf = cluster.mtbf_seconds
    kept = math.exp(-cluster.behind_seconds / mtbf) / math.expm1(
        (interval + cluster.blocking_seconds) / mtbf
    )
    return kept * interval / (mtbf * math.exp(cluster.restart_seconds / mtbf))


def _slowdowns(cluster: Cluster, generator: np.random.Generator, count: int) -> np.ndarray:
    """How many times as long steps take between two restarts: that of the slowest node.

    All of N nodes exceed x with probability 1 - (1 - f exp(-x/s))^N, solved for x.
    """
    nodes = math.ceil(cluster.chips / cluster.chips_per_node)
    slowest = -np.expm1(np.log(generator.uniform(size=count)) / nodes)  # 1 - u^(1/N)
    with np.errstate(divide="ignore"):  # no slow nodes: none exceeds anything
        excess = np.log(cluster.slow_fraction) - np.log(slowest)
    return 1 + cluster.slow_excess * np.maximum(excess, 0)


def _restart_times(cluster: Cluster, generator: np.random.Generator, count: int) -> np.ndarray:
    """Seconds from a failure until steps run again; a restart that fails starts over."""
    needed = cluster.restart_seconds
    times = np.full(count, needed)
    waiting = np.arange(count)
    while waiting.size:
        failures = generator.exponential(cluster.mtbf_seconds, waiting.size)
        failed = failures < needed
        waiting = waiting[failed]
        times[waiting] += failures[failed]
    return times

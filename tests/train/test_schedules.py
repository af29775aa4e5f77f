"""Every boundary of spec §8's table, on the published run and on a scaled one."""

import math
from dataclasses import replace

import numpy as np
import pytest

from dsv3_jax import configs
from dsv3_jax.parallel.pipeline.schedules import make_schedule
from dsv3_jax.train import schedules

T = 10**12
SEQUENCE = 4096


@pytest.fixture(scope="module")
def v3():
    return configs.get("deepseek_v3_671b")


@pytest.mark.parametrize(
    ("tokens", "rate", "speed", "weight"),
    [
        (0, 2.2e-4, 1e-3, 0.3),
        (10 * T - 1, 2.2e-4, 1e-3, 0.3),
        (10 * T, 2.2e-4, 1e-3, 0.1),
        (12_150 * 10**9, (2.2e-4 + 2.2e-5) / 2, 1e-3, 0.1),  # middle of the cosine
        (14_300 * 10**9 - 1, 2.2e-5, 1e-3, 0.1),
        (14_300 * 10**9, 2.2e-5, 0.0, 0.1),
        (14_633 * 10**9 - 1, 2.2e-5, 0.0, 0.1),
        (14_633 * 10**9, 7.3e-6, 0.0, 0.1),
        (14_800 * 10**9, 7.3e-6, 0.0, 0.1),
    ],
)
def test_table_of_the_published_run(v3, tokens, rate, speed, weight):
    assert schedules.learning_rate(v3, 2000, tokens) == pytest.approx(rate, rel=1e-9)
    assert schedules.bias_speed(v3, tokens) == speed
    assert schedules.mtp_weight(v3, tokens) == weight


def test_cosine_is_the_cosine_of_the_tokens(v3):
    for tenth in range(11):
        tokens = 10 * T + tenth * 430 * 10**9
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * tenth / 10)) / 2
        assert schedules.learning_rate(v3, 10**5, tokens) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 1.1e-7),
        (1000, 1.1e-4),
        (1999, 1999 / 2000 * 2.2e-4),
        (2000, 2.2e-4),
        (2001, 2.2e-4),
    ],
)
def test_warm_up_counts_steps(v3, step, rate):
    tokens = step * 3072 * SEQUENCE
    assert schedules.learning_rate(v3, step, tokens) == pytest.approx(rate, rel=1e-12)


def test_no_warm_up_starts_at_the_peak(v3):
    config = replace(v3, optim=replace(v3.optim, warmup_steps=0))
    assert schedules.learning_rate(config, 0, 0) == 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    [
        (0, 3072),
        (39_083_333_333, 3072),  # 1/12 of the ramp: one micro-batch of 1024 more, just before ...
        (39_083_333_334, 4096),  # ... and just after
        (234_500_000_000, 9216),  # half
        (469_000_000_000 - 1, 14336),
        (469_000_000_000, 15360),
        (14_800 * 10**9, 15360),
    ],
)
def test_batch_ramp(v3, tokens, sequences):
    assert schedules.sequences_per_step(v3, tokens) == sequences


def test_a_short_run_follows_the_same_table(v3):
    """A run of 148 tokens' worth of steps meets each boundary at the same share of its length."""
    short = replace(v3, optim=replace(v3.optim, total_tokens=14_800.0))
    for tokens in (0, 469, 9_999, 10_000, 12_345, 14_299, 14_300, 14_632, 14_633, 14_799):
        long_tokens = tokens * 10**9
        assert schedules.learning_rate(short, 5000, tokens) == pytest.approx(
            schedules.learning_rate(v3, 5000, long_tokens), rel=1e-9
        )
        assert schedules.bias_speed(short, tokens) == schedules.bias_speed(v3, long_tokens)
        assert schedules.mtp_weight(short, tokens) == schedules.mtp_weight(v3, long_tokens)


def test_remaining_steps_counts_the_ramp(v3):
    tokens = steps = 0
    while tokens < v3.total_tokens:
        tokens += schedules.sequences_per_step(v3, tokens) * SEQUENCE
        steps += 1
    assert schedules.remaining_steps(v3, 0, 0) == steps
    assert schedules.remaining_steps(v3, steps, tokens) == 0
    fixed = replace(v3, run=replace(v3.run, num_steps=30))
    assert schedules.remaining_steps(fixed, 12, 0) == 18


def test_every_batch_of_the_ramp_feeds_dualpipe(v3):
    """Half of the micro-batches enter at each end, at every size on the way."""
    ramp = v3.data.batch_ramp_fraction * v3.total_tokens
    points = np.linspace(0, 1.1 * ramp, 997)
    for sequences in {schedules.sequences_per_step(v3, int(tokens)) for tokens in points}:
        count, rest = divmod(sequences, v3.microbatch_sequences)
        assert rest == 0
        make_schedule(v3.parallel.schedule, v3.parallel.pipe, count)

"""Schedules of spec §8: pure functions of the tokens consumed; only the warm-up counts steps.

`step` is the number of optimizer steps already taken and `tokens` the tokens they consumed, so both
are 0 for the first step. A run of other length than 14.8T maps onto the published table by
`optim.total_tokens`. Host-side Python arithmetic: 14.8T does not fit in an int32.
"""

import math

from dsv3_jax.config import Config

PUBLISHED_TOKENS = 14.8e12  # the length of the published run
DECAY_START = 10e12  # the cosine begins and lambda drops
DECAY_END = 14.3e12  # the cosine ends and the bias freezes
LAST_PHASE = 14.633e12  # the second constant rate
DECAYED = 0.1  # 2.2e-5 / 2.2e-4
LAST = 7.3e-6 / 2.2e-4


def published_tokens(config: Config, tokens: int) -> float:
    """The point of the published run that `tokens` of this run stands for."""
    return tokens * (PUBLISHED_TOKENS / config.total_tokens)


def learning_rate(config: Config, step: int, tokens: int) -> float:
    """Linear 0 -> peak over `optim.warmup_steps` steps, constant, cosine, two constants.

    With `optim.schedule='cosine'` one cosine to `optim.final_lr` takes their place (spec §10.1).
    """
    peak, point = config.optim.peak_lr, published_tokens(config, tokens)
    warmup = min(1.0, step / config.optim.warmup_steps) if config.optim.warmup_steps else 1.0
    if config.optim.schedule == "cosine":
        progress = min(1.0, tokens / config.total_tokens)
        floor = config.optim.final_lr
        return warmup * (floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
    if point < DECAY_START:
        scale = 1.0
    elif point < DECAY_END:
        progress = (point - DECAY_START) / (DECAY_END - DECAY_START)
        scale = DECAYED + (1.0 - DECAYED) * 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        scale = DECAYED if point < LAST_PHASE else LAST
    return peak * warmup * scale


def bias_speed(config: Config, tokens: int) -> float:
    """gamma of the router-bias update: constant, then 0 (spec §3)."""
    if config.optim.schedule == "cosine":
        return config.balance.bias_speed
    return config.balance.bias_speed if published_tokens(config, tokens) < DECAY_END else 0.0


def mtp_weight(config: Config, tokens: int) -> float:
    """lambda of the MTP loss (spec §4)."""
    early = published_tokens(config, tokens) < DECAY_START or config.optim.schedule == "cosine"
    return config.optim.mtp_weight if early else config.optim.mtp_weight_late


def sequences_per_step(config: Config, tokens: int) -> int:
    """Global batch in sequences: a linear ramp in tokens, rounded down to its steps."""
    data, rows = config.data, config.batch_ramp_sequences
    ramp_tokens = data.batch_ramp_fraction * config.total_tokens
    if data.sequences_per_step_start is None or tokens >= ramp_tokens:
        return data.sequences_per_step
    growth = data.sequences_per_step - data.sequences_per_step_start
    sequences = data.sequences_per_step_start + growth * tokens / ramp_tokens
    return int(sequences // rows) * rows


def remaining_steps(config: Config, step: int, tokens: int) -> int:
    """Optimizer steps from (step, tokens) to the end of the run, the batch ramp included."""
    if config.run.num_steps is not None:
        return max(0, config.run.num_steps - step)
    steps = 0
    while tokens < config.total_tokens:
        sequences = sequences_per_step(config, tokens)
        if sequences == config.data.sequences_per_step:
            left = config.total_tokens - tokens
            return steps + math.ceil(left / (sequences * config.data.sequence_length))
        tokens += sequences * config.data.sequence_length
        steps += 1
    return steps

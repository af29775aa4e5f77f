"""Phases of a context extension: the published ones, what they keep, and mistakes."""

from dataclasses import replace

import pytest

from dsv3_jax import configs
from dsv3_jax.errors import UserError
from dsv3_jax.posttrain.extend import phases
from dsv3_jax.train import schedules


def config_with(name="deepseek_v3_671b", **extend):
    config = configs.get(name)
    return replace(
        config,
        checkpoint=replace(config.checkpoint, initial_weights="weights"),
        extend=replace(config.extend, **extend),
    )


def test_the_published_phases(tmp_path):
    """Spec §9: 1920 x 32K and 480 x 128K, 1000 steps each at 7.3e-6, 62.9M tokens a step."""
    config = config_with()
    first, second = phases(config, tmp_path)
    data = first.config.data, second.config.data
    shapes = [(d.sequences_per_step, d.sequence_length) for d in data]
    assert shapes == [(1920, 32768), (480, 131072)]
    for phase in (first, second):
        assert phase.config.tokens_per_step == 62_914_560 == config.tokens_per_step
        assert schedules.remaining_steps(phase.config, 0, 0) == 1000
        yarn = phase.config.model.yarn
        assert (yarn.enabled, yarn.factor, yarn.beta_slow, yarn.beta_fast) == (True, 40, 1, 32)
        for step, tokens in ((0, 0), (500, 500 * 62_914_560), (999, 999 * 62_914_560)):
            assert schedules.learning_rate(phase.config, step, tokens) == pytest.approx(7.3e-6)
            assert schedules.bias_speed(phase.config, tokens) == 0.0
            assert schedules.mtp_weight(phase.config, tokens) == 0.1
            assert schedules.sequences_per_step(phase.config, tokens) == shapes[phase.number - 1][0]
    assert first.config.checkpoint.initial_weights == "weights"
    assert second.config.checkpoint.initial_weights == str(first.workdir)
    assert first.workdir != second.workdir
    model = replace(second.config.model, yarn=config.model.yarn)
    assert model == config.model  # nothing but YaRN changes


def test_one_phase_alone(tmp_path):
    (only,) = phases(config_with(second_length=0), tmp_path)
    assert only.config.data.sequence_length == 32768


@pytest.mark.parametrize(
    ("extend", "message"),
    [
        ({"first_length": 4096}, "first_length=4096 must exceed the 4096"),
        ({"first_length": 131072, "second_length": 131072}, "second_length=131072 must exceed"),
        ({"second_length": 262144}, "more than YaRN reaches: model.yarn.factor=40 .* 163840"),
        ({"first_length": 32767}, "does not divide the 62914560 tokens of a step"),
    ],
)
def test_lengths_that_cannot_be(tmp_path, extend, message):
    with pytest.raises(UserError, match=message):
        list(phases(config_with(**extend), tmp_path))


def test_weights_are_needed(tmp_path):
    with pytest.raises(UserError, match="initial_weights is empty"):
        list(phases(configs.get("tiny_extend"), tmp_path))

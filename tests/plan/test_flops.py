"""FLOPs a token against the published figures and a sum over single matrix products."""

import dataclasses

import pytest

from dsv3_jax.configs import get
from dsv3_jax.plan.flops import flops_per_token

V3 = get("deepseek_v3_671b").model


def test_v3_matches_the_published_figures():
    assert flops_per_token(V3, 4096) == pytest.approx(250.46e9, abs=0.005e9)
    assert flops_per_token(V3, 4096, causal=False) == pytest.approx(281.16e9, abs=0.005e9)


def test_one_mtp_module_adds_a_block_a_projection_and_a_head():
    attention = 3 * 2 * 128 * (192 + 128) * 4096 / 2
    active_block = 187_107_328 + 14_336 + 1_835_008 + 256 + 9 * 44_040_192
    added = 6 * (active_block + 102_760_448 + 3 * 7168 + 926_679_040) + attention
    plain = flops_per_token(V3, 4096)
    assert flops_per_token(V3, 4096, include_mtp=True) - plain == pytest.approx(added, rel=1e-9)


def test_mtp_is_free_when_absent():
    model = dataclasses.replace(V3, mtp_depth=0)
    assert flops_per_token(model, 4096, include_mtp=True) == flops_per_token(V3, 4096)

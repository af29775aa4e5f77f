"""FLOPs a token against the published figures and a sum over single matrix products."""

import dataclasses

import pytest

from dsv3_jax.configs import get
from dsv3_jax.plan.flops import (
    decode_flops_per_token,
    flops_per_token,
    prefill_flops_per_token,
)

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


def _forward_weights(model):
    """Numbers of V3's weights that one token meets in the 61 blocks, from spec §1.1."""
    mla, norms, expert = 187_107_328, 14_336, 44_040_192
    moe = 1_835_008 + 256 + 9 * expert
    return 61 * (mla + norms) + 3 * 396_361_728 + 58 * moe + 7168


def test_prefill_runs_the_blocks_for_every_token_and_the_head_for_one():
    length = 1024
    attention = 61 * 2 * 128 * (192 + 128) * length / 2
    expected = 2 * _forward_weights(V3) + 2 * 926_679_040 / length + attention
    assert prefill_flops_per_token(V3, length) == pytest.approx(expected, rel=1e-12)
    both = prefill_flops_per_token(V3, length, causal=False)
    assert both - prefill_flops_per_token(V3, length) == pytest.approx(attention, rel=1e-6)


def test_decode_attends_in_the_latent_space():
    """Every einsum of one token's absorbed attention, counted one by one (spec §2)."""
    context, heads, nope, rope, latent, value = 4989, 128, 128, 64, 512, 128
    attention = (
        2 * heads * nope * latent  # q_nope into the latent space
        + 2 * heads * latent * context  # scores with the latents
        + 2 * heads * rope * context  # scores with the rope keys
        + 2 * heads * latent * context  # mix of the latents
        + 2 * heads * latent * value  # back to values
    )
    wkv_b = latent * heads * (nope + value)
    expected = 2 * (_forward_weights(V3) + 926_679_040) + 61 * (attention - 2 * wkv_b)
    assert decode_flops_per_token(V3, context) == pytest.approx(expected, rel=1e-12)

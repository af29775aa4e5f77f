"""The memory estimate against arrays placed on devices."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsv3_jax.configs import get
from dsv3_jax.parallel.rules import weight_sharding
from dsv3_jax.plan.memory import device_memory
from dsv3_jax.plan.parameters import weights


def with_fields(config, group, **changes):
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **changes)}
    )


@pytest.mark.parametrize("layout", ["zero1_ep", "fsdp_ep"])
def test_parameter_bytes_are_those_of_real_shards(layout):
    config = with_fields(get("tiny"), "parallel", layout=layout)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))
    placed = [
        jax.device_put(
            np.zeros(w.shape, np.float32), weight_sharding(mesh, w.shape, w.axes, layout)
        )
        for w in weights(config.model)
    ]
    first_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in placed)
    assert device_memory(config).parameters == first_device


def test_fsdp_holds_fewer_parameters_and_the_same_moments():
    v3 = get("deepseek_v3_671b")
    zero1 = device_memory(v3)
    fsdp = device_memory(with_fields(v3, "parallel", layout="fsdp_ep"))
    assert fsdp.parameters < zero1.parameters / 6
    # 1024 devices share two bfloat16 numbers a weight; a few small leaves are split less finely.
    even_share = 2 * 2 * sum(w.size for w in weights(v3.model) if w.trained) / 1024
    for estimate in (zero1, fsdp):
        assert even_share <= estimate.moments < 1.01 * even_share


def test_recomputation_and_precision_shrink_activations_alone():
    small = get("small")
    by_remat = {
        remat: device_memory(with_fields(small, "precision", remat=remat))
        for remat in ("none", "paper", "full")
    }
    none, paper, full = (by_remat[remat].activations for remat in ("none", "paper", "full"))
    assert none > paper > full
    assert len({estimate.parameters for estimate in by_remat.values()}) == 1
    wide = device_memory(with_fields(small, "precision", compute="float32", remat="none"))
    assert wide.activations == 2 * none
    doubled = device_memory(with_fields(small, "precision", moments="float32", remat="none"))
    assert doubled.moments == 2 * by_remat["none"].moments


def test_total_is_the_sum_of_the_parts():
    estimate = device_memory(get("tiny"))
    parts = dataclasses.asdict(estimate)
    assert set(parts) == {"parameters", "gradients", "moments", "codes", "activations", "logits"}
    assert estimate.total == math.fsum(parts.values())
    assert parts.pop("codes") == 0 and min(parts.values()) > 0


def test_fp8_keeps_codes_of_activations_and_of_weights():
    v3 = with_fields(get("deepseek_v3_671b"), "parallel", pipe=1)
    bf16, fp8 = (
        device_memory(with_fields(v3, "precision", compute=compute, remat="paper"))
        for compute in ("bfloat16", "fp8")
    )
    # tests/precision/test_activation_cache.py counts 0.41 in the layer itself.
    assert 0.35 < fp8.activations / bf16.activations < 0.55
    # Two bytes for nearly every weight of four.
    assert 0.45 < fp8.codes / fp8.parameters < 0.5
    assert bf16.codes == 0 and fp8.moments == bf16.moments

"""Plans that fit, ranked; and what helps a plan that does not."""

import dataclasses
import itertools
import time

import pytest

from dsv3_jax.configs import get
from dsv3_jax.overrides import load_config
from dsv3_jax.plan import search as search_module
from dsv3_jax.plan.memory import device_memory
from dsv3_jax.plan.search import knobs, predict_step, search
from dsv3_jax.plan.topology import Topology, changes, parse_topology

V3 = "deepseek_v3_671b"


def small_model():
    """`small` with layers and experts enough for pipelines on 16 devices."""
    small = get("small")
    model = dataclasses.replace(small.model, num_layers=8, num_experts=32)
    data = dataclasses.replace(
        small.data, sequences_per_step=64, sequences_per_step_start=None, microbatch_sequences=None
    )
    return dataclasses.replace(small, model=model, data=data)


def sixteen_devices(hbm_bytes):
    where = parse_topology("h200:2x1x8")
    return Topology(where.name, dataclasses.replace(where.chip, hbm_bytes=hbm_bytes), 16)


def test_best_plans_fit_are_valid_and_come_first():
    config, roomy = small_model(), sixteen_devices(141_000_000_000)
    plans = search(config, roomy, count=1000)
    seconds = [plan.prediction.step.seconds for plan in plans]
    assert seconds == sorted(seconds)
    meshes = {dataclasses.astuple(plan.config.parallel)[:3] for plan in plans}
    assert all(pipe * data * expert == 16 for pipe, data, expert in meshes)
    assert {mesh[0] for mesh in meshes} >= {1, 2, 4}
    # Stopping early, by a bound, changes nothing.
    few = search(config, roomy, count=3)
    assert [plan.prediction.step.seconds for plan in few] == seconds[:3]

    needed = sorted(plan.memory.total for plan in plans)
    tight = sixteen_devices(round(needed[len(needed) // 4] / 0.9))
    fitting = search(config, tight, count=1000)
    assert 0 < len(fitting) and all(p.memory.fits(tight.chip.hbm_bytes) for p in fitting)
    assert fitting[0].prediction.step.seconds >= seconds[0]
    assert search(config, sixteen_devices(1000)) == []


def test_bound_is_below_the_prediction():
    where = parse_topology("h200:16x1x8")
    for schedule, pipe, deferred in itertools.product(
        ("dualpipe", "dualpipev", "zb1p", "1f1b"), (4, 8), (None, 0, 1)
    ):
        config = load_config(
            V3,
            [
                f"parallel.schedule={schedule}",
                f"parallel.pipe={pipe}",
                f"parallel.expert={128 // pipe}",
                f"parallel.max_deferred={'none' if deferred is None else deferred}",
                f"data.microbatch_sequences={128 // pipe}",
                f"data.sequences_per_step={128 // pipe * 3 * pipe}",
                "data.sequences_per_step_start=none",
            ],
        )
        bound = search_module._least_seconds(config, where)
        assert 0.5 < bound / predict_step(config, where).step.seconds <= 1.0001, config.parallel


def test_knobs_help_and_say_what_they_do():
    config = load_config(V3, ["parallel.max_deferred=none"])
    where = parse_topology("h200:128x1x8")
    now = device_memory(config)
    assert not now.fits(where.chip.hbm_bytes)
    found = knobs(config, where)
    assert ["parallel.max_deferred=1"] in [sets for sets, _ in found]
    fits = [memory.fits(where.chip.hbm_bytes) for _, memory in found]
    assert fits[0] and fits == sorted(fits, reverse=True)
    for sets, memory in found:
        changed = load_config(V3, ["parallel.max_deferred=none", *sets])
        assert device_memory(changed) == memory and memory.total < now.total
        assert changes(config, changed) == sets


@pytest.mark.slow
def test_2048_devices_are_searched_in_half_a_minute():
    started = time.perf_counter()
    plans = search(get(V3), parse_topology("h200:256x1x8"))
    assert time.perf_counter() - started < 30
    assert len(plans) == 10 and plans[0].config.parallel.pipe > 1

"""Costs from the published step, and predictions against it and against counted FLOPs."""

import dataclasses

import pytest

from dsv3_jax.overrides import load_config
from dsv3_jax.parallel.pipeline.schedules import make_schedule
from dsv3_jax.parallel.pipeline.simulate import Costs, lockstep_makespan, simulate
from dsv3_jax.parallel.pipeline.tables import build_table
from dsv3_jax.plan.chips import get_chip
from dsv3_jax.plan.chunk_time import PUBLISHED_SYSTEM, Assumptions
from dsv3_jax.plan.cost import (
    MEASURED_V3,
    MEASURED_V3_MULTI_RAIL,
    RunCost,
    pipeline_time,
    predict,
)

H800 = get_chip("h800")
# The published run: PP16 x EP64 x 2 on 2,048 H800, a sequence a device (spec §8).
V3 = load_config(
    "deepseek_v3_671b",
    [
        "parallel.data=2",
        "parallel.max_deferred=none",
        "precision.compute=fp8",
        "precision.remat=paper",
        "data.sequences_per_step_start=none",
        "data.microbatch_sequences=128",
    ],
)
ONE_DEVICE = load_config(
    "deepseek_v3_671b",
    [
        "parallel.pipe=1",
        "parallel.max_deferred=none",
        "parallel.expert=1",
        "parallel.dispatch=padded",
        "parallel.buffer_factor=none",
        "precision.remat=none",
        "data.sequences_per_step_start=none",
        "data.sequences_per_step=8",
        "data.microbatch_sequences=2",
    ],
)


def _cost(step_seconds, tokens_per_step=15360 * 4096):
    return RunCost(step_seconds=step_seconds, tokens_per_step=tokens_per_step, num_devices=2048)


def test_published_phases_give_the_published_cost():
    """Spec §12: 19.9 s a step, 272.8B tokens a day, 180K hours a trillion, $5.328M."""
    cost = _cost(MEASURED_V3.seconds)
    assert cost.step_seconds == pytest.approx(19.926, rel=0.01)
    assert cost.tokens_per_day == pytest.approx(272.80e9, rel=0.01)
    assert cost.device_hours(1e12) == pytest.approx(180e3, rel=0.01)
    assert cost.device_hours(14.8e12) == pytest.approx(2_664e3, rel=0.01)
    assert cost.dollars(14.8e12) == pytest.approx(5.328e6, rel=0.01)
    assert cost.days(14.8e12) == pytest.approx(54.3, rel=0.01)
    assert _cost(MEASURED_V3_MULTI_RAIL.seconds).tokens_per_day == pytest.approx(272.52e9, rel=0.01)


def test_published_phases_are_the_whole_step_up_to_their_rounding():
    """Six numbers of two decimals: at most 0.03 s between their sum and the published step."""
    assert abs(MEASURED_V3.seconds - 19.926) < 0.03
    assert abs(MEASURED_V3_MULTI_RAIL.seconds - 19.946) < 0.03


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "zb1p", "1f1b"])
def test_phases_of_a_schedule_add_up_to_its_makespan(name):
    costs = Costs(forward=2.0, backward=5.0, weights=1.5, overlapped=6.0)
    schedule = make_schedule(name, 4, 12)
    step = pipeline_time(schedule, costs)
    assert step.seconds == pytest.approx(simulate(schedule, costs).makespan)
    # Whatever the order, a rank runs each of its chunks once.
    chunks = 12 * schedule.directions / (2 if name == "dualpipe" else 1)
    pairs = step.overlapped / costs.overlapped
    assert step.forward == pytest.approx((chunks - pairs) * costs.forward)
    assert step.backward == pytest.approx((chunks - pairs) * (costs.backward - costs.weights))
    assert step.weights == pytest.approx((chunks - pairs) * costs.weights)


def test_predicted_v3_step_is_near_the_measured_one():
    """Nothing here is fitted to the step: shares of the peak come from one layer's profile."""
    step = predict(V3, H800, PUBLISHED_SYSTEM).step
    assert step.seconds == pytest.approx(19.926, rel=0.15)
    assert step.forward == pytest.approx(MEASURED_V3.forward, rel=0.1)
    assert step.overlapped == pytest.approx(MEASURED_V3.overlapped, rel=0.1)
    both = MEASURED_V3.backward + MEASURED_V3.weights
    assert step.backward + step.weights == pytest.approx(both, rel=0.2)
    assert step.optimizer == pytest.approx(MEASURED_V3.optimizer, rel=0.3)


def test_predicted_run_and_utilization():
    predicted = predict(V3, H800, PUBLISHED_SYSTEM, dollars_per_hour=3.0)
    cost = predicted.cost
    assert cost.num_devices == 2048
    assert cost.tokens_per_step == 62_914_560
    assert cost.dollars(14.8e12) == pytest.approx(3 * cost.device_hours(14.8e12))
    # Spec §12's causal MFU, 38.94 %, is the published step's: 250.46 GF a token over its time.
    assert predicted.model_flops_utilization * cost.step_seconds == pytest.approx(
        0.3894 * 19.926, rel=0.005
    )


def test_one_device_computes_the_flops_of_its_tokens():
    """At the peak and with nothing to communicate, a step is its FLOPs over the peak."""
    peak = Assumptions(fp8=1.0, bf16=1.0, attention=1.0)
    step = predict(ONE_DEVICE, H800, peak).step
    tokens = ONE_DEVICE.tokens_per_step
    # 6 a parameter met; attention backward counts 2.5 forwards, its recomputed scores included.
    met = 37_552_297_472 - 926_679_040 + 2_541_458_688 - 926_679_040
    core = 62 * 2 * 128 * (192 + 128) * 2048
    seconds = (6 * met + 3.5 * core) * tokens / H800.bf16_flops
    assert step.seconds - step.optimizer == pytest.approx(seconds, rel=1e-3)
    # Gradient, float32 master both ways, two BF16 moments both ways, a BF16 copy: 22 bytes.
    trained = 671_026_419_200 + 11_610_068_224
    assert step.optimizer == pytest.approx(22 * trained / H800.hbm_bandwidth)


def test_overlap_hides_communication_and_one_way_schedules_do_not():
    one_way = dataclasses.replace(V3, parallel=dataclasses.replace(V3.parallel, schedule="zb1p"))
    dualpipe, zb1p = (predict(c, H800, PUBLISHED_SYSTEM) for c in (V3, one_way))
    assert dualpipe.chunk.exposed == 0
    assert zb1p.step.overlapped == 0
    assert zb1p.step.seconds > 1.2 * dualpipe.step.seconds


def test_slow_links_are_waited_for():
    slow = dataclasses.replace(H800, between_node_bandwidth=10e9)
    fast, waiting = (predict(V3, chip, PUBLISHED_SYSTEM).chunk for chip in (H800, slow))
    # Another rank may be the busiest then: one with more MoE layers, whose compute is less.
    assert fast.overlapped < waiting.overlapped <= fast.overlapped + waiting.exposed


def test_our_program_pays_for_ticks_and_buffers():
    config = load_config(
        "deepseek_v3_671b", ["data.sequences_per_step=2560", "data.sequences_per_step_start=none"]
    )
    predicted = predict(config, get_chip("h200"))
    table = build_table(make_schedule("dualpipe", 16, 40), max_deferred=1)
    makespan = lockstep_makespan(table.kinds(), predicted.chunk.costs)
    assert predicted.step.seconds - predicted.step.optimizer == pytest.approx(makespan)
    exact = predict(config, get_chip("h200"), PUBLISHED_SYSTEM)
    assert predicted.chunk.all_to_all > exact.chunk.all_to_all
    assert exact.step.lockstep == 0


def test_recomputation_lengthens_the_backward_chunk_alone():
    chunks = {
        policy: predict(
            dataclasses.replace(V3, precision=dataclasses.replace(V3.precision, remat=policy)),
            H800,
            PUBLISHED_SYSTEM,
        ).chunk
        for policy in ("none", "paper", "full")
    }
    assert chunks["none"].backward < chunks["paper"].backward < chunks["full"].backward
    assert len({chunk.forward for chunk in chunks.values()}) == 1
    again = chunks["full"].backward - chunks["none"].backward
    assert 0.5 * chunks["none"].forward < again < chunks["none"].forward


def test_gathered_weights_bound_small_micro_batches():
    """`fsdp_ep` on a torus: a micro-batch too small to hide the weights takes their time."""

    def chunk(rows):
        return predict(
            load_config(
                "deepseek_v3_671b",
                [
                    "parallel.pipe=1",
                    "parallel.max_deferred=none",
                    "parallel.data=16",
                    "parallel.layout=fsdp_ep",
                    "parallel.dispatch=ragged",
                    "parallel.buffer_factor=none",
                    "data.sequence_length=256",
                    "data.sequences_per_step_start=none",
                    "data.batch_ramp_sequences=none",
                    f"data.microbatch_sequences={rows}",
                ],
            ),
            get_chip("v5e"),
        ).chunk

    one, five = chunk(1024), chunk(5120)
    assert five.weights == pytest.approx(5 * one.weights)
    assert five.forward < 4 * one.forward

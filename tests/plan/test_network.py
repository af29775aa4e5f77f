"""Expected reach of a token against simulated routing; exchange times against published rates."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.config import ParallelConfig
from dsv3_jax.configs import get
from dsv3_jax.errors import UserError
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.parallel.expert_parallel import make_hops
from dsv3_jax.parallel.mesh import abstract_mesh
from dsv3_jax.plan.chips import CHIPS, get_chip
from dsv3_jax.plan.network import (
    RowsSent,
    exchange_seconds,
    expected_positions,
    node_shape,
    row_bytes,
    rows_one_hop,
    rows_padded,
    rows_two_hop,
)

V3 = get("deepseek_v3_671b").model
LITE = get("v2_lite_16b").model


def _simulated_positions(model, num_positions, tokens=4000, seed=0):
    """Mean number of distinct positions over random kept groups and random experts in them."""
    rng = np.random.default_rng(seed)
    per_group = model.num_experts // model.num_groups
    total = 0
    for _ in range(tokens):
        kept = rng.permutation(model.num_groups)[: model.num_groups_kept]
        candidates = (kept[:, None] * per_group + np.arange(per_group)).ravel()
        experts = rng.choice(candidates, model.experts_per_token, replace=False)
        total += len(set((experts * num_positions // model.num_experts).tolist()))
    return total / tokens


@pytest.mark.parametrize(
    ("model", "positions"),
    [
        (V3, 4),  # two groups a node
        (V3, 8),  # one
        (V3, 64),  # eight devices a group
        (LITE, 8),  # no groups
        (dataclasses.replace(V3, num_experts=160, num_groups_kept=3), 10),  # 1.25 nodes a group
    ],
    ids=["node-of-2-groups", "node", "device", "no-groups", "straddling"],
)
def test_expected_positions_match_simulated_routing(model, positions):
    assert expected_positions(model, positions) == pytest.approx(
        _simulated_positions(model, positions), rel=0.01
    )


def test_real_group_choice_reaches_more_nodes_but_no_more_than_it_keeps():
    """Groups kept for their two best random scores, as the router does (spec §3)."""
    scores = np.random.default_rng(0).random((4000, 8, 32))
    best_two = np.sort(scores, axis=-1)[..., -2:].sum(-1)
    kept = np.argsort(best_two, axis=-1)[:, -4:]
    masked = np.full_like(scores, -1.0)
    np.put_along_axis(
        masked, kept[..., None], np.take_along_axis(scores, kept[..., None], axis=1), axis=1
    )
    experts = np.argsort(masked.reshape(4000, 256), axis=-1)[:, -8:]
    nodes = np.mean([len(set(row)) for row in (experts // 32).tolist()])
    assert expected_positions(V3, 8) < nodes <= 4
    assert nodes == pytest.approx(expected_positions(V3, 8), rel=0.1)


# DeepEP's published rates on H800, GB/s of dispatch and combine, local rows counted (spec §7): of
# the rows that devices get where all are in a node, else of those that nodes get.
@pytest.mark.parametrize(
    ("devices", "dispatch", "combine"),
    [(8, 153, 158), (16, 43, 43), (32, 58, 57), (64, 51, 50)],
)
def test_published_expert_parallel_rates(devices, dispatch, combine):
    chip = get_chip("h800")
    nodes, per_node = node_shape(chip, devices)
    model = dataclasses.replace(V3, num_groups=nodes, num_groups_kept=min(4, nodes))
    rows = rows_two_hop(model, nodes, per_node)
    counted = rows.within if nodes == 1 else expected_positions(model, nodes)
    for published, fp8 in ((dispatch, True), (combine, False)):
        row = row_bytes(V3.width, fp8=fp8)
        seconds = exchange_seconds(chip, devices, rows, 4096, row)
        rate = counted * 4096 * row / seconds
        assert rate / 1e9 == pytest.approx(published, rel=0.16)


def test_published_decode_bound():
    """32 tokens to 9 experts, one byte there and two back, at 50 GB/s: 120.96 us (spec §11.2)."""
    chip = dataclasses.replace(get_chip("h800"), between_node_bandwidth=50e9)
    rows = RowsSent(between=9, within=0)
    there, back = (exchange_seconds(chip, 320, rows, 32, byte * 7000) for byte in (1, 2))
    assert (there + back) * 1e6 == pytest.approx(120.96)


def test_nodes_of_a_group_are_alike():
    assert node_shape(get_chip("h200"), 64) == (8, 8)
    assert node_shape(get_chip("h200"), 12) == (3, 4)
    assert node_shape(get_chip("gb200"), 64) == (1, 64)


def test_two_hops_spare_the_slow_links():
    one, two = rows_one_hop(V3, 8, 8), rows_two_hop(V3, 8, 8)
    assert one.between > 2 * two.between
    assert two.between <= 4 * 7 / 8  # kept groups, less those of the own node


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_padded_buffers_move_what_the_dispatch_allocates(factor):
    runtime = Runtime(
        shard_of=abstract_mesh(ParallelConfig(expert=64)),
        dispatch="hierarchical",
        buffer_factor=factor,
        devices_per_node=8,
    )
    hops = make_hops(runtime, num_tokens=4096, top_k=8)
    crossing, within = (hop.num_positions * hop.capacity / 4096 for hop in hops)
    rows = rows_padded(V3, 8, 8, factor, two_hop=True)
    assert rows == RowsSent(between=crossing * 7 / 8, within=within)  # an eighth stays


def test_buffers_without_a_factor_hold_every_token():
    assert rows_padded(V3, 8, 8, None, two_hop=True) == RowsSent(between=7, within=64)
    assert rows_padded(V3, 1, 8, None, two_hop=False) == RowsSent(between=0, within=8)


def test_torus_time_grows_with_its_longest_side():
    """64 chips as 4 x 4 x 4: a row to each of them crosses 64 * 4 / 8 rows' worth of every link."""
    chip = get_chip("v5p")
    rows = RowsSent(between=0, within=64)
    assert exchange_seconds(chip, 64, rows, 100, 1000) == pytest.approx(
        100 * 1000 * 64 * 4 / 8 / 90e9
    )
    more = exchange_seconds(chip, 512, rows, 100, 1000)
    assert more == pytest.approx(2 * exchange_seconds(chip, 64, rows, 100, 1000))


def test_unknown_chip_suggests_the_closest():
    with pytest.raises(UserError, match="did you mean 'h800'.*allowed: h100"):
        get_chip("h8000")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_chips_are_plausible(chip):
    """Catches a slip of units or of a power of ten."""
    assert 1e14 < chip.bf16_flops <= chip.fp8_flops < 1e16
    assert 16 * 2**30 <= chip.hbm_bytes < 300 * 2**30
    assert 5e11 < chip.hbm_bandwidth < 2e13
    assert chip.between_node_bandwidth < chip.in_node_bandwidth < chip.hbm_bandwidth

"""The integer table: a replay by names, every wrong entry caught, its sizes, and lock-step time."""

import dataclasses
import functools

import numpy as np
import pytest

from dsv3_jax.parallel.pipeline.schedules import SCHEDULES, Schedule, make_schedule
from dsv3_jax.parallel.pipeline.simulate import Costs, lockstep_makespan, simulate
from dsv3_jax.parallel.pipeline.tables import Table, build_table, check_table


@functools.cache
def _paper_run(name: str) -> tuple[Schedule, Table]:
    """The paper's 120 micro-batches on 16 ranks."""
    schedule = make_schedule(name, 16, 120)
    return schedule, build_table(schedule)


@pytest.mark.parametrize("max_deferred", [None, 0, 1, 3])
@pytest.mark.parametrize("ranks,microbatches", [(2, 4), (2, 10), (4, 8), (6, 14), (8, 20)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_replay_finds_every_value_in_its_slot(name, ranks, microbatches, max_deferred):
    schedule = make_schedule(name, ranks, microbatches)
    table = build_table(schedule, max_deferred=max_deferred)
    check_table(table)
    assert all(column.shape == (table.ticks, ranks) for column in table.columns.values())
    assert all(column.dtype == np.int32 for column in table.columns.values())
    if max_deferred is not None:
        assert table.num_weight_slots <= max(1, max_deferred)
    if max_deferred == 0:
        assert table.columns["b_weights"].max() == table.columns["w_slot"].max() == -1


@pytest.mark.parametrize("name", ["dualpipev", "zb1p", "1f1b"])
def test_fewest_microbatches_and_odd_ranks(name):
    schedule = make_schedule(name, 3, 6 if name == "dualpipev" else 3)
    check_table(build_table(schedule))


@pytest.mark.parametrize("name,microbatches", [("dualpipe", 4), ("dualpipev", 4), ("zb1p", 3)])
def test_every_wrong_entry_is_caught(name, microbatches):
    table = build_table(make_schedule(name, 2, microbatches))
    for column, entries in table.columns.items():
        for tick, rank in np.ndindex(entries.shape):
            for wrong in range(-1, entries.max() + 2):
                if wrong == entries[tick, rank]:
                    continue
                changed = entries.copy()
                changed[tick, rank] = wrong
                bad = dataclasses.replace(table, columns=table.columns | {column: changed})
                with pytest.raises(ValueError, match=r"tick \d+, rank \d, [abfgw]_"):
                    check_table(bad)


def test_the_error_names_the_reading_column():
    table = build_table(make_schedule("dualpipe", 4, 8))
    inputs = table.columns["b_input"].copy()
    tick = int(np.flatnonzero(inputs[:, 1] >= 0)[0])
    inputs[tick, 1] = 1 - inputs[tick, 1]
    bad = dataclasses.replace(table, columns=table.columns | {"b_input": inputs})
    with pytest.raises(ValueError, match=f"tick {tick}, rank 1, b_input: gradient slot"):
        check_table(bad)


@pytest.mark.parametrize("ranks,microbatches", [(4, 8), (8, 20), (16, 34)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_buffers_are_as_small_as_the_published_memory(name, ranks, microbatches):
    table = build_table(make_schedule(name, ranks, microbatches))
    two = table.slots_per_rank == 2
    assert table.num_residual_slots == table.num_stages + two  # deferred W included
    assert table.num_activation_slots == (2 if two else 1)
    assert table.num_gradient_slots == (2 if two else 1)
    waiting = {"dualpipe": ranks // 2, "dualpipev": ranks, "zb1p": ranks, "1f1b": 1}
    assert table.num_weight_slots == waiting[name]


@pytest.mark.parametrize("overlapped", [3.0, 2.2])
@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "zb1p"])
def test_lockstep_costs_less_than_one_percent_in_the_paper_run(name, overlapped):
    schedule, table = _paper_run(name)
    costs = Costs(overlapped=overlapped)
    assert lockstep_makespan(table.kinds(), costs) <= 1.01 * simulate(schedule, costs).makespan


@pytest.mark.parametrize("ranks,microbatches", [(2, 4), (4, 8), (8, 16), (8, 20)])
def test_lockstep_costs_dualpipe_nothing_up_to_eight_ranks(ranks, microbatches):
    schedule = make_schedule("dualpipe", ranks, microbatches)
    assert lockstep_makespan(build_table(schedule).kinds()) == simulate(schedule).makespan


def test_ticks_are_packed():
    # Two ticks of F‖B a micro-batch pair, and no tick in which every rank is idle.
    _, table = _paper_run("dualpipe")
    assert table.ticks == 154
    assert all(any(kinds for kinds in row) for row in table.kinds())

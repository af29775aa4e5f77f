"""Schedules and simulator: the published order, bubble and memory of spec §6; the drawing tool."""

import json
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.parallel.pipeline.draw import to_svg, to_text
from dsv3_jax.parallel.pipeline.schedules import (
    SCHEDULES,
    Op,
    Schedule,
    limit_deferred,
    make_schedule,
    to_json,
)
from dsv3_jax.parallel.pipeline.simulate import (
    Costs,
    bubble_formula,
    lockstep_makespan,
    peak_deferred,
    peak_live,
    simulate,
)

WORKED = [  # spec §6.3, P=4, C=8
    "F0.0 F0.1 F0.2 F1.0 Bi1.0 W1.0 F1.1 F0.3‖B1.1 F1.2‖B0.0 B1.2 F1.3‖B0.1 B1.3 Bi0.2 W0.2 Bi0.3 "
    "W0.3",
    "F0.0 F1.0 F0.1 F1.1 F0.2 B1.0 F1.2‖B0.0 F0.3‖B1.1 F1.3‖B0.1 B1.2 B0.2 Bi1.3 Bi0.3 W1.3 W0.3",
]
SIZES = [(name, ranks) for name in SCHEDULES for ranks in (4, 8, 16)]


def _step(text: str, *, mirrored: bool) -> tuple[Op, ...]:
    ops = []
    for word in text.split("‖"):
        kind = word.rstrip("0123456789.")
        direction, microbatch = map(int, word.removeprefix(kind).split("."))
        ops.append(Op(kind, 1 - direction if mirrored else direction, microbatch))
    return tuple(ops)


def test_dualpipe_is_the_published_program():
    programs = [[_step(s, mirrored=False) for s in text.split()] for text in WORKED]
    programs += [[_step(s, mirrored=True) for s in text.split()] for text in reversed(WORKED)]
    assert make_schedule("dualpipe", 4, 8).programs == tuple(map(tuple, programs))


@pytest.mark.parametrize("name,ranks", SIZES)
def test_every_chunk_runs_once_and_weights_follow_first_in_first_out(name, ranks):
    schedule = make_schedule(name, ranks, 2 * ranks + 2)
    each = schedule.microbatches // (2 if name == "dualpipe" else 1)
    chunks = {(d, m) for d in range(schedule.directions) for m in range(each)}
    for program in schedule.programs:
        ops = [op for step in program for op in step]
        done = {kind: [(o.direction, o.microbatch) for o in ops if o.kind == kind]
                for kind in ("F", "B", "Bi", "W")}  # fmt: skip
        assert sorted(done["F"]) == sorted(chunks)
        assert sorted(done["B"] + done["Bi"]) == sorted(chunks)
        assert done["W"] == done["Bi"]


@pytest.mark.parametrize("name,ranks", SIZES)
@pytest.mark.parametrize("more", [0, 2, 26])
def test_idle_time_and_memory_are_those_of_the_formulas(name, ranks, more):
    schedule = make_schedule(name, ranks, 2 * ranks + more)
    assert set(simulate(schedule).idle) == {bubble_formula(schedule)}
    assert max(peak_live(schedule)) <= schedule.num_stages + (schedule.directions == 2)


@pytest.mark.parametrize(
    "name,stages,bubble",
    [("1f1b", 8, 21), ("zb1p", 8, 7), ("dualpipe", 8, 6), ("dualpipe", 16, 14),
     ("dualpipev", 8, 6), ("dualpipev", 16, 14)],
)  # fmt: skip
def test_bubble_of_a_number_of_stages(name, stages, bubble):
    ranks = stages // 2 if name == "dualpipev" else stages
    assert simulate(make_schedule(name, ranks, 2 * stages)).bubble == bubble


@pytest.mark.parametrize("ranks,microbatches,bubble", [(4, 8, 1.2), (8, 20, 3.6), (16, 64, 8.4)])
def test_overlap_shrinks_the_bubble_of_dualpipe(ranks, microbatches, bubble):
    simulation = simulate(make_schedule("dualpipe", ranks, microbatches), Costs(overlapped=2.2))
    assert simulation.bubble == pytest.approx(bubble)


def test_the_formula_is_an_upper_bound_for_other_costs():
    costs = Costs(forward=2, backward=4, weights=1, overlapped=6)
    schedule = make_schedule("dualpipe", 8, 20)
    assert (simulate(schedule, costs).bubble, bubble_formula(schedule, costs)) == (19, 21)


def test_zb1p_holds_no_more_than_1f1b():
    zb1p, plain = make_schedule("zb1p", 8, 20), make_schedule("1f1b", 8, 20)
    held = {"F": 1, "B": -1, "W": -1}  # a chunk's activations stay until its weight gradients
    for program in zb1p.programs:
        counts = [held.get(op.kind, 0) for step in program for op in step]
        assert max(sum(counts[:n]) for n in range(len(counts) + 1)) == max(peak_live(plain))


def test_deadlock_is_reported():
    schedule = make_schedule("1f1b", 2, 2)
    swapped = tuple(reversed(schedule.programs[1]))
    with pytest.raises(ValueError, match=r"1f1b: ranks \[0, 1\] wait for each other"):
        simulate(Schedule("1f1b", 2, 2, (schedule.programs[0], swapped)))


def test_a_tick_lasts_as_long_as_its_busiest_rank():
    ticks = [[("F",), ("B",)], [("F", "B"), ()], [("F", "Bi", "W"), ("Bi",)]]
    assert lockstep_makespan(ticks) == 2 + 3 + 3
    assert lockstep_makespan(ticks, Costs(overlapped=2.2)) == pytest.approx(2 + 2.2 + 2.2)


@pytest.mark.parametrize("most", [0, 1, 3])
def test_limit_of_deferred_weights(most):
    schedule = make_schedule("dualpipe", 8, 20)
    limited = limit_deferred(schedule, most)
    assert max(peak_deferred(schedule)) == 4
    assert max(peak_deferred(limited)) == most
    work = Costs(overlapped=3)
    for before, after in zip(schedule.programs, limited.programs, strict=True):
        times = [sum(work.of([op.kind for op in step]) for step in p) for p in (before, after)]
        assert times[0] == times[1]


@pytest.mark.parametrize(
    "name,ranks,microbatches,message",
    [
        ("dualpipe", 5, 20, "parallel.pipe=5: .* use 4 or 6"),
        ("dualpipe", 1, 20, "parallel.pipe=1: .* use 2"),
        ("dualpipe", 4, 7, "7 micro-batches .* parallel.schedule=dualpipe .* at least 8"),
        ("dualpipe", 4, 9, "9 micro-batches: .* use 8 or 10"),
        ("dualpipev", 4, 7, "7 micro-batches .* parallel.schedule=dualpipev .* at least 8"),
        ("zb1p", 4, 3, "3 micro-batches .* parallel.schedule=zb1p .* at least 4"),
        ("1f1b", 4, 3, "3 micro-batches .* parallel.schedule=1f1b .* at least 4"),
        ("1f1b", 0, 3, "parallel.pipe=0 must be at least 1"),
        ("dualpip", 4, 8, "parallel.schedule='dualpip' .* did you mean 'dualpipe'"),
    ],
)
def test_bad_input_names_key_value_and_the_nearest_choice(name, ranks, microbatches, message):
    with pytest.raises(UserError, match=message):
        make_schedule(name, ranks, microbatches)


def test_text_is_a_grid_of_simulated_times():
    lines = to_text(make_schedule("1f1b", 2, 2)).splitlines()
    assert lines[0].endswith("makespan 9, idle 3")
    assert lines[1] == "rank 0   F0 F1 ......B0--- ...B1---"
    assert lines[2] == "rank 1   ...F0 B0--- F1 B1--- ......"
    assert "f2&B0---" in to_text(make_schedule("dualpipe", 4, 8))


def test_svg_holds_every_chunk_within_the_picture():
    schedule = make_schedule("dualpipe", 4, 8)
    root = ElementTree.fromstring(to_svg(schedule))
    width, height = float(root.get("width")), float(root.get("height"))
    boxes = [e for e in root if e.tag.endswith("rect") and "%" not in e.get("width")]
    filled = [
        e for e in boxes if e.get("fill") not in ("none", "#f2f2f2") and float(e.get("y")) > 50
    ]
    assert len(filled) == sum(len(step) for program in schedule.programs for step in program)
    assert sum(e.get("fill") == "none" for e in boxes) == sum(
        len(step) == 2 for program in schedule.programs for step in program
    )
    for box in boxes:
        assert float(box.get("x")) + float(box.get("width")) <= width
        assert float(box.get("y")) + float(box.get("height")) <= height


def _tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tools.pipeline_schedule", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_tool_prints_json_of_the_documented_form():
    schedule = make_schedule("dualpipe", 4, 8)
    printed = _tool("--schedule=dualpipe", "--ranks=4", "--microbatches=8", "--format=json")
    data = json.loads(printed.stdout)
    assert list(data) == ["schedule", "ranks", "microbatches", "programs"]
    assert (data["schedule"], data["ranks"], data["microbatches"]) == ("dualpipe", 4, 8)
    assert data["programs"][0][7] == [
        {"kind": "F", "direction": 0, "microbatch": 3},
        {"kind": "B", "direction": 1, "microbatch": 1},
    ]
    assert data == to_json(schedule)


def test_tool_prints_text_and_writes_svg(tmp_path):
    schedule, sizes = make_schedule("zb1p", 2, 4), ("--ranks=2", "--microbatches=4")
    assert _tool("--schedule=zb1p", *sizes, "--format=text").stdout == to_text(schedule) + "\n"
    file = tmp_path / "zb1p.svg"
    _tool("--schedule=zb1p", *sizes, "--format=svg", f"--output={file}")
    assert file.read_text() == to_svg(schedule) + "\n"


def test_tool_ends_with_one_line_on_a_mistake():
    printed = _tool("--schedule=dualpipe", "--ranks=5", "--microbatches=20")
    assert printed.returncode == 2
    assert printed.stderr.startswith("error: parallel.pipe=5")
    assert len(printed.stderr.splitlines()) == 1

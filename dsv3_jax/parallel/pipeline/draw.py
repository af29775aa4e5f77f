"""Draws a schedule at its event-simulated times: a text grid, or SVG like the published figure."""

from html import escape

from dsv3_jax.parallel.pipeline.schedules import Op, Schedule
from dsv3_jax.parallel.pipeline.simulate import UNIT_COSTS, Costs, Simulation, simulate

NAMES = {"F": "forward", "B": "backward", "Bi": "input gradients", "W": "weight gradients"}
COLOURS = {  # of a kind, by direction
    "F": ("#f4b942", "#f9dfa5"),
    "B": ("#4f9d69", "#a8d5b5"),
    "Bi": ("#3fa7a7", "#a9dcdc"),
    "W": ("#5b7fc7", "#b4c5ea"),
}
LETTERS = {"F": "Ff", "B": "Bb", "Bi": "Ii", "W": "Ww"}  # of a kind, by direction
UNIT, ROW, LEFT, TOP = 22, 24, 64, 56  # pixels: of F = 1, of a rank, margins


def to_text(schedule: Schedule, costs: Costs = UNIT_COSTS) -> str:
    """A grid: one row a rank, time to the right, `F3&b1` for an overlapped pair, dots for idle."""
    simulation = simulate(schedule, costs)
    words = [["&".join(map(_word, step)) for step in program] for program in schedule.programs]
    column = 1.0 + max(
        len(word) / (end - start)
        for row in zip(words, simulation.starts, simulation.ends, strict=True)
        for word, start, end in zip(*row, strict=True)
    )  # characters of one unit of time, so that every word fits and a blank follows it
    lines = [_title(schedule, costs, simulation)]
    for rank, row in enumerate(words):
        line = "." * round(simulation.makespan * column)
        times = zip(row, simulation.starts[rank], simulation.ends[rank], strict=True)
        for word, start, end in times:
            left, right = round(start * column), round(end * column)
            word = word.ljust(right - left - 1, "-") + " "
            line = line[:left] + word + line[right:]
        lines.append(f"rank {rank:<3d} {line.rstrip()}")
    kinds = ", ".join(f"{LETTERS[kind][0]} {name}" for kind, name in NAMES.items())
    lines.append(f"{kinds}; small letters: direction 1; &: overlapped")
    return "\n".join(lines)


def to_svg(schedule: Schedule, costs: Costs = UNIT_COSTS) -> str:
    """The grid as SVG: colour by kind, shade by direction, an overlapped pair in two halves."""
    simulation = simulate(schedule, costs)
    legend, legend_end = _legend(schedule)
    width = max(LEFT + simulation.makespan * UNIT, legend_end) + 16
    height = TOP + schedule.ranks * ROW + 36
    shapes = [_text(LEFT, 18, _title(schedule, costs, simulation), anchor="start")]
    shapes += legend
    for rank, program in enumerate(schedule.programs):
        y = TOP + rank * ROW
        shapes.append(_text(LEFT - 8, y + ROW / 2 + 4, f"rank {rank}", anchor="end"))
        shapes.append(_box(LEFT, y, simulation.makespan * UNIT, ROW, "#f2f2f2"))
        times = zip(program, simulation.starts[rank], simulation.ends[rank], strict=True)
        for step, start, end in times:
            x, wide, tall = LEFT + start * UNIT, (end - start) * UNIT, ROW / len(step)
            for half, op in enumerate(step):
                shapes.append(_box(x, y + half * tall, wide, tall, COLOURS[op.kind][op.direction]))
                middle = y + (half + 0.5) * tall + 3.5
                shapes.append(_text(x + wide / 2, middle, str(op.microbatch)))
            if len(step) > 1:
                shapes.append(_box(x, y, wide, ROW, "none", line=1.5))
    bottom = TOP + schedule.ranks * ROW
    for time in range(0, int(simulation.makespan) + 1, 10):
        x = LEFT + time * UNIT
        shapes.append(f'<path d="M{x:g} {bottom}v5" stroke="#222"/>')
        shapes.append(_text(x, bottom + 17, str(time)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="10">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(shapes) + "\n</svg>"
    )


def _title(schedule: Schedule, costs: Costs, simulation: Simulation) -> str:
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.microbatches} micro-batches; "
        f"F={costs.forward:g} B={costs.backward:g} W={costs.weights:g} F&B={costs.overlapped:g}: "
        f"makespan {simulation.makespan:g}, idle {simulation.bubble:g}"
    )


def _word(op: Op) -> str:
    return f"{LETTERS[op.kind][op.direction]}{op.microbatch}"


def _legend(schedule: Schedule) -> tuple[list[str], float]:
    """The kinds the schedule uses, in a row; and where that row ends."""
    shapes, x = [], float(LEFT)
    used = {op.kind for program in schedule.programs for step in program for op in step}
    for kind in (kind for kind in NAMES if kind in used):
        for direction in range(schedule.directions):
            shapes.append(_box(x, 30, 14, 14, COLOURS[kind][direction]))
            name = NAMES[kind] + (f", direction {direction}" if schedule.directions > 1 else "")
            shapes.append(_text(x + 19, 41, name, anchor="start"))
            x += 36 + 5.4 * len(name)
    return shapes, x


def _box(x: float, y: float, width: float, height: float, fill: str, line: float = 0.4) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
        f'stroke="#222" stroke-width="{line:g}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'

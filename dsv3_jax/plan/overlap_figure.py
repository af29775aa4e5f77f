"""A picture of what a device computed and transferred in a window of a profile."""

import re
from collections.abc import Sequence
from pathlib import Path

from dsv3_jax.plan.overlap_profile import Event

_MATRIX_PRODUCTS = re.compile(r"nvjet|gemm|cutlass|cublas|mosaic|dot|fusion.*matmul", re.IGNORECASE)
COLOURS = {
    "matrix products, attention": "#4c72b0",
    "everything else that computes": "#a8bfdd",
    "all-to-all, computing meanwhile": "#55a868",
    "all-to-all, nothing else runs": "#c44e52",
    "other collectives": "#b8a36a",
}


def draw(events: Sequence[Event], path: Path, window_ms: float) -> None:
    """Writes a picture of the middle `window_ms` of a device's events.

    Args:
      path: its ending is the format: '.svg', '.png'.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    middle = (min(e.start for e in events) + max(e.end for e in events)) / 2
    start, end = middle - window_ms * 5e5, middle + window_ms * 5e5
    shown = [e for e in events if e.end > start and e.start < end]
    busy = [(e.start, e.end) for e in shown if e.is_compute]

    figure, axes = plt.subplots(figsize=(12, 2.4))
    bars: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for event in shown:
        for height, colour, left, right in _bars(event, busy):
            left, right = max(left, start), min(right, end)
            if right > left:
                span = ((left - start) / 1e6, (right - left) / 1e6)
                bars.setdefault((height, colour), []).append(span)
    for (height, colour), spans in bars.items():
        axes.broken_barh(spans, (height, 0.8), facecolors=colour, edgecolor="none")
    axes.set_yticks([0.4, 1.4], ["transfers", "compute"])
    axes.set_xlim(0, window_ms)
    axes.set_xlabel("milliseconds")
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    axes.legend(handles=handles, ncol=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(
        path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None
    )
    plt.close(figure)


def _bars(event: Event, busy: Sequence[tuple[float, float]]):
    """(height, colour, start, end) of the rectangles of an event."""
    products, rest, hidden, alone, other = COLOURS.values()
    if event.is_compute:
        name = event.kernel
        yield 1.0, products if _MATRIX_PRODUCTS.search(name) else rest, event.start, event.end
    elif event.is_collective and event.kind != "all-to-all":
        yield 0.0, other, event.start, event.end
    elif event.is_collective:
        yield 0.0, alone, event.start, event.end
        for left, right in busy:  # drawn over it
            if right > event.start and left < event.end:
                yield 0.0, hidden, max(left, event.start), min(right, event.end)

"""What runs while chunks travel between devices: of a compiled program, or of a profile.

python -m tools.overlap --hlo=FILE [--copies_above=MIB]
python -m tools.overlap --profile=DIR [--trace_figure=FILE]

FILE holds the text of a program compiled for GPU or TPU, `compiled.as_text()`: lists for each
all-to-all how many matmuls of the forward and the backward chunk are issued between its start and
its end, and the copies in loops that the device waits for. DIR is that of `jax.profiler.trace`:
lists for each collective how long it took and how much of that the same device computed; FILE
(.svg, .png) receives a picture of the middle of what the first device did. Exit code
2, with one line: the file or the folder is something else.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main
from dsv3_jax.plan import hlo, overlap, overlap_figure, overlap_profile
from tools.text import aligned

_HLO = flags.DEFINE_string("hlo", None, "File with the text of a compiled program.")
_PROFILE = flags.DEFINE_string("profile", None, "Folder that jax.profiler.trace wrote.")
_COPIES_ABOVE = flags.DEFINE_float("copies_above", 64.0, "MiB from which copies are listed.")
_FIGURE = flags.DEFINE_string("trace_figure", None, "Picture to draw of a profile.")
_WINDOW_MS = flags.DEFINE_float("window_ms", 60.0, "Milliseconds that it shows.", lower_bound=0.01)
_MIB = 2**20


def program_report(text: str, copies_above: int) -> list[str]:
    """Lines about a compiled program; `copies_above` in bytes."""
    program = hlo.parse(text)
    found = overlap.transfers(program)
    scopes = (*overlap.SCOPES, overlap.OTHER)
    rows = [("computation", "collective", "of", "MiB", "issued", *scopes, "kernels")]
    rows += [
        (
            transfer.computation,
            transfer.name,
            transfer.scope,
            f"{transfer.num_bytes / _MIB:.2f}",
            "async" if transfer.asynchronous else "sync",
            *(str(transfer.matmuls.get(scope, 0)) for scope in scopes),
            str(sum(transfer.kernels.values())),
        )
        for transfer in found
    ]
    fused = overlap.in_fused_bodies(found)
    spanning = sum(transfer.other_chunk_matmuls > 0 for transfer in fused)
    copies = overlap.copies_of(program, copies_above)
    return [
        "matmuls issued between start and end, by chunk:",
        *aligned(rows, num_left=3),
        f"{sum(t.asynchronous for t in found)} of {len(found)} are asynchronous; "
        f"where a forward and a backward chunk meet, {spanning} of {len(fused)} all-to-alls span "
        "matmuls of the other chunk",
        f"copies of {copies_above / _MIB:g} MiB or more in loops: {len(copies)}",
        *(f"  {c.computation} {c.name} {c.num_bytes / _MIB:.1f} MiB" for c in copies),
    ]


def profile_report(times: Sequence[overlap_profile.CollectiveTime]) -> list[str]:
    """Lines about the collectives of a profile."""

    def row(name: str, scope: str, of: Sequence[overlap_profile.CollectiveTime]):
        total, hidden = sum(t.total_ns for t in of), sum(t.hidden_ns for t in of)
        share = f"{hidden / total:.1%}" if total else "-"
        runs = str(sum(t.runs for t in of))
        return (name, scope, runs, f"{total / 1e6:.3f}", f"{hidden / 1e6:.3f}", share)

    rows = [("collective", "of", "runs", "ms", "hidden ms", "hidden")]
    rows += [row(time.name, time.scope, [time]) for time in times]
    kinds = sorted({overlap_profile.kind_of(time.name) for time in times})
    of_kinds = {k: [t for t in times if overlap_profile.kind_of(t.name) == k] for k in kinds}
    rows += [row(f"all {kind or 'others'}", "", of) for kind, of in of_kinds.items()]
    return aligned([*rows, row("all", "", times)], num_left=2)


def main(argv: list[str]) -> None:
    if len(argv) != 1 or (_HLO.value is None) == (_PROFILE.value is None):
        raise UserError("give one of --hlo=FILE and --profile=DIR")
    if _FIGURE.value and not _PROFILE.value:
        raise UserError("--trace_figure draws a profile; give --profile=DIR")
    if _PROFILE.value is not None:
        devices = overlap_profile.device_events(Path(_PROFILE.value))
        lines = profile_report(overlap_profile.collective_times(devices))
        if _FIGURE.value:
            overlap_figure.draw(devices[0], Path(_FIGURE.value), _WINDOW_MS.value)
    else:
        try:
            text = Path(_HLO.value).read_text(errors="replace")
        except OSError as error:
            raise UserError(f"--hlo={_HLO.value} cannot be read: {error.strerror}") from None
        lines = program_report(text, round(_COPIES_ABOVE.value * _MIB))
    print("\n".join(lines))


if __name__ == "__main__":
    run_main(main)

"""Draws a run: losses, expert load, MaxVio of each layer, learning rate.

python -m tools.plot_run WORKDIR [--output=FILE.png]
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_OUTPUT = flags.DEFINE_string("output", None, "Where the PNG goes; default WORKDIR/run.png.")


def plot(workdir: Path, output: Path) -> None:
    """Reads metrics.jsonl and expert_load.jsonl of a run and writes a PNG.

    Raises:
      UserError: there is nothing to draw, or the file cannot be written.
    """
    import matplotlib
    import numpy as np

    from dsv3_jax.train.metrics import EXPERT_LOAD_FILE, METRICS_FILE, read_records

    records = read_records(workdir / METRICS_FILE)
    if not records:
        raise UserError(f"{workdir / METRICS_FILE} holds no record; give the workdir of a run")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, ((losses, load), (violation, rate)) = pyplot.subplots(
        2, 2, figsize=(12, 8), layout="constrained"
    )
    steps = [r["step"] for r in records]
    losses.plot(steps, [r["loss"] for r in records], linewidth=0.8, label="training")
    if any(r["loss_mtp"] for r in records):
        losses.plot(steps, [r["loss_mtp"] for r in records], linewidth=0.8, label="MTP")
    evaluated = [r for r in records if "validation_loss" in r]
    losses.plot(
        [r["step"] for r in evaluated],
        [r["validation_loss"] for r in evaluated],
        "o-",
        label="validation",
    )
    losses.set(title="loss (nats a token)", xlabel="step")
    losses.legend()

    loads = read_records(workdir / EXPERT_LOAD_FILE)
    if loads:
        load_LE = np.array(loads[-1]["load"])
        image = load.imshow(load_LE, aspect="auto", cmap="coolwarm", vmin=0, vmax=2)
        load.set(
            title=f"expert load / mean load, step {loads[-1]['step']}",
            xlabel="expert",
            ylabel="MoE layer",
        )
        figure.colorbar(image, ax=load)

    for layer, values in enumerate(zip(*(r["max_violation_layers"] for r in records), strict=True)):
        violation.plot(steps, values, linewidth=0.8, label=f"layer {layer}")
    violation.set(title="MaxVio of each MoE layer (MTP last)", xlabel="step", ylim=(0, None))
    if records[0]["max_violation_layers"]:
        violation.legend(fontsize="small", ncols=4)

    rate.plot(steps, [r["learning_rate"] for r in records])
    rate.set(title="learning rate", xlabel="step")
    figure.suptitle(str(workdir))
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror})") from None
    pyplot.close(figure)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("name one working directory, e.g. python -m tools.plot_run runs/tiny")
    workdir = Path(argv[1])
    output = Path(_OUTPUT.value) if _OUTPUT.value else workdir / "run.png"
    plot(workdir, output)
    print(output)


if __name__ == "__main__":
    run_main(main)

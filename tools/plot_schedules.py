"""Draws the schedules of a configuration over its tokens: rate, batch, bias speed, MTP weight.

python -m tools.plot_schedules [--config=deepseek_v3_671b] [--set KEY=VALUE]... [--output=FILE.png]
"""

from absl import flags

from dsv3_jax.errors import run_main

_CONFIG = flags.DEFINE_string("config", "deepseek_v3_671b", "Name of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE. Repeatable.")
_OUTPUT = flags.DEFINE_string("output", "schedules.png", "Where the PNG goes.")

POINTS = 2000


def main(argv: list[str]) -> None:
    del argv
    from dsv3_jax.overrides import load_config
    from dsv3_jax.train import schedules

    config = load_config(_CONFIG.value, _SET.value)
    import matplotlib
    import numpy as np

    matplotlib.use("agg")
    from matplotlib import pyplot

    tokens = [int(t) for t in np.linspace(0, config.total_tokens - 1, POINTS)]
    # The warm-up counts steps: a point of the first ones is about tokens / batch steps in.
    steps = [t // (schedules.sequences_per_step(config, t) * config.data.sequence_length)
             for t in tokens]  # fmt: skip
    rate = [schedules.learning_rate(config, s, t) for s, t in zip(steps, tokens, strict=True)]
    curves = {
        "learning rate": rate,
        "batch (sequences)": [schedules.sequences_per_step(config, t) for t in tokens],
        "bias speed gamma": [schedules.bias_speed(config, t) for t in tokens],
        "MTP weight lambda": [schedules.mtp_weight(config, t) for t in tokens],
    }
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5), layout="constrained", sharex=True)
    for axis, (name, values) in zip(axes.flat, curves.items(), strict=True):
        axis.plot(tokens, values)
        axis.set(title=name)
    for axis in axes[-1]:
        axis.set(xlabel="tokens consumed")
    figure.suptitle(config.run.name)
    figure.savefig(_OUTPUT.value, dpi=80)
    print(f"wrote {_OUTPUT.value}")


if __name__ == "__main__":
    run_main(main)

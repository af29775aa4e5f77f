"""Pre-trains a configuration.

    python -m experiments.pretrain [--config=tiny] [--set KEY=VALUE]... [--workdir=DIR] [--dry_run]

`--dry_run` checks the configuration, traces the training step without arrays or devices, shows
parameters, FLOPs and memory, and ends. Exit codes: 0 done, 2 a mistake in the call (one line), 75
stopped by a signal after a save; the same command then continues.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the configuration, see dsv3_jax/configs.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. optim.peak_lr=1e-3.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Results and checkpoints; default runs/NAME.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and describe the run, train nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    # Mistakes are found before anything slow is imported.
    from dsv3_jax.overrides import load_config
    from dsv3_jax.train.workdir import check_inputs, check_workdir, default_workdir

    config = load_config(_CONFIG.value, _SET.value)
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(config)
    if _DRY_RUN.value:
        from dsv3_jax.train.dry_run import dry_run

        print(dry_run(config))
        return 0
    check_workdir(config, workdir)
    check_inputs(config, workdir)
    from dsv3_jax.parallel.mesh import emulate_cpu_devices, initialize_processes

    emulate_cpu_devices(config.parallel)
    initialize_processes()
    from dsv3_jax.train.loop import train

    return train(config, workdir)


if __name__ == "__main__":
    run_main(main)

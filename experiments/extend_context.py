"""Extends the context of a trained model by YaRN, in two phases (spec §9).

    python -m experiments.extend_context --config=deepseek_v3_671b
        --set checkpoint.initial_weights=DIR [--set KEY=VALUE]... [--workdir=DIR] [--dry_run]

`--config` is that of the pre-training; `extend.first_length`, `extend.second_length`,
`extend.steps` and `extend.learning_rate` have the published values. Each phase is a run in a folder
of WORKDIR, and the last one's is the extended model. `--dry_run` checks and describes both. Exit
codes: 0 done, 2 a mistake in the call (one line), 75 stopped by a signal after a save; the same
command then continues where it was, in whichever phase.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny_extend", "Name of the pre-training configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. extend.steps=500.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Results; default runs/NAME_extended.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and describe the phases, train nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    # Mistakes are found before anything slow is imported.
    from dsv3_jax.overrides import load_config
    from dsv3_jax.posttrain.extend import phases
    from dsv3_jax.train.workdir import check_workdir
    from dsv3_jax.validate import validate

    config = load_config(_CONFIG.value, _SET.value)
    workdir = Path(_WORKDIR.value or f"runs/{config.run.name}_extended")
    all_phases = list(phases(config, workdir))
    for phase in all_phases:
        validate(phase.config)
    if _DRY_RUN.value:
        from dsv3_jax.train.dry_run import dry_run

        for phase in all_phases:
            print(dry_run(phase.config))
        return 0
    for phase in all_phases:
        check_workdir(phase.config, phase.workdir)
    from dsv3_jax.parallel.mesh import emulate_cpu_devices, initialize_processes

    emulate_cpu_devices(config.parallel)
    initialize_processes()
    from dsv3_jax.train.loop import train

    for phase in all_phases:
        if code := train(phase.config, phase.workdir):
            return code
    return 0


if __name__ == "__main__":
    run_main(main)

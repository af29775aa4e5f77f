"""Fine-tunes a trained model on conversations (spec §10.1).

    python -m experiments.sft [--config=tiny_sft] --set checkpoint.initial_weights=DIR
        --set sft.conversations=FILE.jsonl [--set KEY=VALUE]... [--workdir=DIR] [--dry_run]

The form of the records is described in dsv3_jax/posttrain/conversations.py. Records that cannot be
used are counted by reason; more than `sft.max_bad_fraction` of them end the run. `--dry_run` reads
the records, traces the training step, and ends. Exit codes: 0 done, 2 a mistake in the call (one
line), 75 stopped by a signal after a save; the same command then continues.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny_sft", "Name of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. sft.epochs=3.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Results and checkpoints; default runs/NAME.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and describe the run, train nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    # Mistakes are found before anything slow is imported.
    from dsv3_jax.overrides import load_config
    from dsv3_jax.train.workdir import check_workdir, default_workdir

    config = load_config(_CONFIG.value, _SET.value)
    workdir = Path(_WORKDIR.value) if _WORKDIR.value else default_workdir(config)
    check_workdir(config, workdir)
    from dsv3_jax.parallel.mesh import emulate_cpu_devices, initialize_processes

    if not _DRY_RUN.value:
        emulate_cpu_devices(config.parallel)
        initialize_processes()
    from dsv3_jax.posttrain.sft import load_data, with_length

    data = load_data(config)
    config = with_length(config, data)
    if _DRY_RUN.value:
        from dsv3_jax.train.dry_run import dry_run

        print(f"{dry_run(config)}\n{data}")
        return 0
    from dsv3_jax.train.loop import train

    return train(config, workdir, data)


if __name__ == "__main__":
    run_main(main)

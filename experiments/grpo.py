"""Improves a fine-tuned model by rewards of its own answers (GRPO, spec §10.3).

    python -m experiments.grpo [--config=tiny_grpo] --set checkpoint.initial_weights=DIR
        [--set KEY=VALUE]... [--workdir=DIR] [--dry_run]

Built in is arithmetic; `--set grpo.problems=FILE.jsonl` gives other problems, see
dsv3_jax/posttrain/problems.py, and `grpo.reward` how answers are judged. `--dry_run` reads the
problems, describes the run and ends. Exit codes: 0 done, 2 a mistake in the call (one line), 75
stopped by a signal after a save; the same command then continues.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny_grpo", "Name of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. grpo.group_size=64.")
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
    from dsv3_jax.posttrain.grpo_run import check_config, train
    from dsv3_jax.posttrain.policy import load_task

    check_config(config)
    task = load_task(config)
    if _DRY_RUN.value:
        from dsv3_jax.train.progress import describe

        print(f"{describe(config, 'planned')}\n{'problems':<12} {task.problems}")
        return 0
    return train(config, workdir, task)


if __name__ == "__main__":
    run_main(main)

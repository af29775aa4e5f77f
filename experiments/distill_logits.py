"""Trains a student on a teacher's next-token distribution (posttrain/distill_logits.py).

    python -m experiments.distill_logits --set distill.teacher=DIR [--config=tiny]
        [--set sft.conversations=FILE.jsonl --set checkpoint.initial_weights=STUDENT]
        [--set distill.top_k=64] [--set KEY=VALUE]... [--workdir=DIR] [--dry_run]

With `sft.conversations` the student learns at the answers of conversations, as in experiments.sft;
without, at every token of the corpus of `data`, with the teacher's tokenizer. `--dry_run` checks
and describes the run. Exit codes: 0 done, 2 a mistake in the call (one line), 75 stopped by a
signal after a save; the same command then continues.
"""

from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the student's configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE, e.g. distill.weight=0.9.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Results; default runs/NAME_distilled.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check and describe the run, train nothing.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    # Mistakes are found before anything slow is imported.
    from dsv3_jax.overrides import load_config
    from dsv3_jax.train.workdir import check_workdir

    config = load_config(_CONFIG.value, _SET.value)
    workdir = Path(_WORKDIR.value or f"runs/{config.run.name}_distilled")
    check_workdir(config, workdir)
    from dsv3_jax.parallel.mesh import emulate_cpu_devices, initialize_processes, make_mesh

    if not _DRY_RUN.value:
        emulate_cpu_devices(config.parallel)
        initialize_processes()
    from functools import partial

    from dsv3_jax.posttrain import distill_logits, sft

    config, data = distill_logits.checked(config), None
    if config.sft.conversations:
        data = sft.load_data(config)
        config = sft.with_length(config, data)
    if _DRY_RUN.value:
        from dsv3_jax.train.dry_run import dry_run

        print(dry_run(config) + (f"\n{data}" if data else ""))
        return 0
    from dsv3_jax.train.loop import train

    return train(
        config,
        workdir,
        data,
        loss=partial(distill_logits.distill_losses, config=config.distill),
        prepare=distill_logits.Teacher(config, make_mesh(config.parallel)),
    )


if __name__ == "__main__":
    run_main(main)

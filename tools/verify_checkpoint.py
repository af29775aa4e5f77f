"""Re-hashes every file of a checkpoint. Exit code 0: intact; 2: damaged, with one line saying how.

python -m tools.verify_checkpoint DIR, where DIR is a working directory or its checkpoints folder
(every step is verified) or the folder of one step.
"""

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.reader import locate, steps_in, verify_step
from dsv3_jax.errors import UserError, run_main


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one directory: python -m tools.verify_checkpoint DIR")
    directory, only = locate(argv[1])
    damaged = []
    for step in steps_in(directory) if only is None else [only]:
        try:
            files = verify_step(directory / str(step))["files"].values()
            print(f"step {step}: {len(files)} files, {sum(f['bytes'] for f in files):,} bytes, ok")
        except manifest.DamagedCheckpoint as error:
            damaged.append(f"step {step} is damaged: {error}")
    if damaged:
        raise UserError(f"{' | '.join(damaged)}; restoring skips it, so delete it or copy it again")


if __name__ == "__main__":
    run_main(main)

"""Damages checkpoints and prepared data in many places; whether each is noticed, as a table.

    python -m tools.bench_damage [--trials=1500] [--seed=0]

A trial flips one bit of a file, cuts it short or deletes it. Of two checkpoints the newer is
damaged: opening must fall back to the older one and name the file. Of a corpus folder any file
is: opening must be an error of one line that names it. Exit code 1: a damage went unseen.
"""

import dataclasses
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax.errors import UserError, run_main

_TRIALS = flags.DEFINE_integer("trials", 1500, "Damages, spread evenly.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of places and bits.")

FLIP, CUT, DELETE = "bit flipped", "cut short", "deleted"
# Two of three trials flip a bit, the fault that storage does not report by itself.
_DAMAGES = (FLIP, FLIP, FLIP, FLIP, CUT, DELETE)

Notices = Callable[[str], bool]  # whether opening notices the damage and names this file


def make_checkpoints(directory: Path) -> Notices:
    """Steps 1 and 2 of a small state."""
    from absl import logging

    from dsv3_jax.checkpoint.manager import CheckpointManager
    from dsv3_jax.checkpoint.reader import open_checkpoint

    logging.set_verbosity(logging.ERROR)  # every fallback is logged
    rng = np.random.default_rng(0)
    manager = CheckpointManager(directory, keep=2)
    for step in (1, 2):
        state = {f"layer_{i}": rng.normal(size=(64, 48)).astype(np.float32) for i in range(4)}
        manager.save(step, state, {"step": step}, wait=True)
    manager.close()

    def notices(name: str) -> bool:
        checkpoint = open_checkpoint(directory)
        rejected = [(step, name in reason) for step, reason in checkpoint.rejected]
        return checkpoint.step == 1 and rejected == [(2, True)]

    return notices


def make_corpus(folder: Path) -> Notices:
    """A corpus folder with two training shards, a validation shard, tokenizer and index."""
    from dsv3_jax.data.pipeline import load_corpus
    from dsv3_jax.data.prepare import write_corpus
    from dsv3_jax.overrides import load_config

    changes = ["data.max_documents=24", "data.validation_documents=4", "model.vocab_size=300"]
    config = load_config("tiny", changes)
    write_corpus(config, folder, shard_documents=10)

    def notices(name: str) -> bool:
        try:
            load_corpus(folder, config, "prepare it again")
        except UserError as error:
            return name in str(error)
        return False

    return notices


def kind(name: str) -> str:
    """Files that hold the same are one row of the table."""
    if "/d/" in f"/{name}":
        return "array data"
    return "*.arrayrecord" if name.endswith(".arrayrecord") else Path(name).name


@dataclasses.dataclass
class Table:
    """Trials and those noticed, by (what, file kind, damage)."""

    tried: Counter = dataclasses.field(default_factory=Counter)
    noticed: Counter = dataclasses.field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{'':12}{'file':24}{'damage':14}{'noticed':>8} of {'trials':>6}"]
        for key in sorted(self.tried):
            what, file, damage = key
            lines.append(
                f"{what:12}{file:24}{damage:14}{self.noticed[key]:8} of {self.tried[key]:6}"
            )
        flips = sum(count for key, count in self.tried.items() if key[2] == FLIP)
        total, seen = self.tried.total(), self.noticed.total()
        lines.append(f"{seen:,} of {total:,} damages noticed and named, {flips:,} of them flips")
        return "\n".join(lines)


def damage_all(
    what: str, folder: Path, notices: Notices, trials: int, rng: random.Random, table: Table
) -> None:
    """Damages every file of a folder in turn, and mends it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for trial in range(trials):
        path, damage = paths[trial % len(paths)], _DAMAGES[trial // len(paths) % len(_DAMAGES)]
        name, intact = path.relative_to(folder).as_posix(), path.read_bytes()
        assert intact, path
        if damage == FLIP:
            flipped = bytearray(intact)
            flipped[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
        elif damage == CUT:
            path.write_bytes(intact[: rng.randrange(len(intact))])
        else:
            path.unlink()
        key = (what, kind(name), damage)
        table.tried[key] += 1
        table.noticed[key] += notices(name)
        path.write_bytes(intact)


def run(folder: Path, trials: int, seed: int) -> Table:
    """Half of the trials on a checkpoint, half on a corpus, made under `folder`."""
    table, rng = Table(), random.Random(seed)
    checkpoints, corpus = folder / "checkpoints", folder / "corpus"
    notices = make_checkpoints(checkpoints)
    damage_all("checkpoint", checkpoints / "2", notices, trials - trials // 2, rng, table)
    damage_all("data", corpus, make_corpus(corpus), trials // 2, rng, table)
    return table


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; give flags only")
    with tempfile.TemporaryDirectory() as folder:
        table = run(Path(folder), _TRIALS.value, _SEED.value)
    print(table)
    return int(table.noticed != table.tried)


if __name__ == "__main__":
    run_main(main)

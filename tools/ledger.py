"""Where the time of a run went, over all its starts (dsv3_jax/train/ledger.py).

    python -m tools.ledger --workdir=runs/tiny [--format=table|json]

'steps' is what the rest is for, with 'rollout' and 'reward' of GRPO: their share is the run's
goodput. 'lost' are steps that were done again after a kill, 'down' is the time between two
processes.
"""

import json
from pathlib import Path

from absl import flags

from dsv3_jax.errors import UserError, run_main
from dsv3_jax.train.ledger import FILE, account

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_FORMAT = flags.DEFINE_enum("format", "table", ["table", "json"], "What to print.")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --NAME=VALUE")
    try:
        seconds = account(Path(_WORKDIR.value))
    except FileNotFoundError:
        raise UserError(f"--workdir={_WORKDIR.value} has no {FILE}; name a run's folder") from None
    if _FORMAT.value == "json":
        print(json.dumps(seconds))
        return
    whole = sum(seconds.values())
    for name, spent in seconds.items():
        print(f"{name:<10} {spent:12.1f} s {100 * spent / whole:6.1f} %")
    print(f"{'together':<10} {whole:12.1f} s")


if __name__ == "__main__":
    run_main(main)

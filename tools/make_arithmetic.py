"""Writes sums to fine-tune on, to reward and to keep apart, for a small model.

    python -m tools.make_arithmetic --output=DIR [--largest=15] [--shown=48]

conversations.jsonl: the sums that are shown with their answers (SFT). problems.jsonl: these and the
others to learn from, as GRPO and distillation read them; the shown ones have their answer as
"response" too. held_out.jsonl: a quarter of all sums, which are in neither.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags

from dsv3_jax.errors import UserError, run_main

_OUTPUT = flags.DEFINE_string("output", None, "Folder for the three files.", required=True)
_LARGEST = flags.DEFINE_integer("largest", 15, "Operand.", lower_bound=1)
_SHOWN = flags.DEFINE_integer("shown", 48, "Sums with their answers.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the order.", lower_bound=0)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags are written --NAME=VALUE")
    operands = range(_LARGEST.value + 1)
    sums = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in operands for b in operands]
    order = np.random.default_rng(_SEED.value).permutation(len(sums))
    held_out, rest = np.split(order, [len(sums) // 4])
    if _SHOWN.value > len(rest):
        raise UserError(
            f"--shown={_SHOWN.value} is more than the {len(rest)} sums that are not held out; "
            "lower it, or raise --largest"
        )
    shown = [sums[i] for i in rest[: _SHOWN.value]]
    hidden = [sums[i] for i in rest[_SHOWN.value :]]
    folder = Path(_OUTPUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "conversations": [{"prompt": s["prompt"], "completion": s["answer"]} for s in shown],
        "problems": [s | {"response": s["answer"]} for s in shown] + hidden,
        "held_out": [sums[i] for i in held_out],
    }
    for name, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
        print(f"{folder / name}.jsonl: {len(records)}")


if __name__ == "__main__":
    run_main(main)

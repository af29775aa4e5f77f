"""Writes tests/golden/*.npz from the plain torch reading of the spec in tests/golden/reference.py.

    python -m tools.make_goldens [--check_transformers] [case ...]

Needs torch; `--check_transformers` writes nothing but compares that reading with the DeepSeek
models of the transformers package, on the same weights.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from absl import app, flags

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from golden import cases, reference  # noqa: E402

_CHECK = flags.DEFINE_bool(
    "check_transformers", False, "compare with the transformers package instead of writing"
)
_SMALLEST_MARGIN = 2e-4  # a float32 run must take every top-k decision as this float64 run does


def compute(case: cases.Case) -> dict[str, np.ndarray]:
    """Everything a golden file holds, in float64 maths.

    Raises:
      ValueError: a top-k decision is too close to call; take another seed.
    """
    model, rows = case.model, case.tokens().tolist()
    w = {
        path: torch.tensor(leaf, dtype=torch.float64, requires_grad="router.bias" not in path)
        for path, leaf in case.weights().items()
    }
    output = reference.forward(w, [row[:-1] for row in rows], model)
    if min(output.margins) < _SMALLEST_MARGIN:
        raise ValueError(f"seed {case.seed}: a routing margin is {min(output.margins):.1e}")
    main, mtp = reference.losses(output, rows, model)
    balance = sum(stats.sequence_loss for stats in output.stats)
    total = main + cases.MTP_WEIGHT * mtp + cases.SEQUENCE_WEIGHT * balance
    total.backward()
    arrays = {"logits": output.logits, "loss_main": main, "loss_mtp": mtp, "loss_total": total}
    for k, logits in enumerate(output.mtp_logits, start=1):
        arrays[f"mtp_logits_{k}"] = logits
    for name in reference.LayerStats.__dataclass_fields__:
        arrays[name] = torch.stack([getattr(stats, name) for stats in output.stats])
    for path, leaf in w.items():
        if leaf.requires_grad:
            arrays[f"gradient/{path}"] = leaf.grad
    return {name: value.detach().numpy().astype(np.float32) for name, value in arrays.items()}


def main(argv: list[str]) -> int | None:
    worst = 0.0
    for name in argv[1:] or cases.CASES:
        case = cases.CASES[name]
        if _CHECK.value:
            from golden import transformers_check

            difference = transformers_check.logits_difference(case)
            worst = max(worst, difference)
            print(f"{name}: largest relative logit difference {difference:.1e}")
            continue
        path = cases.FOLDER / f"{name}.npz"
        np.savez_compressed(path, **compute(case))
        print(f"{path}: {path.stat().st_size / 1024:.0f} KB")
    return 1 if worst > 2e-5 else None


if __name__ == "__main__":
    app.run(main)

"""Writes tests/golden/eplb.npz: placements that the published balancer computes for random loads.

    python -m tools.make_eplb_golden --checkout=DIR

DIR is a checkout of the repository deepseek-ai/EPLB; needs torch. Equal loads are sorted in their
order: torch leaves it open, and what it does depends on the processor.

The file holds `sizes` [cases, 7] (layers, experts, slots, groups, nodes, devices, most copies) and,
of all cases one after the other, `loads` (layers, experts), `slots` (layers, slots), `replicas`
(layers, experts, most copies) and `counts` (layers, experts).
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from absl import app, flags

_CHECKOUT = flags.DEFINE_string("checkout", None, "folder with the published eplb.py")
flags.mark_flag_as_required("checkout")
_TARGET = Path(__file__).parents[1] / "tests" / "golden" / "eplb.npz"
_CASES = 200


def random_case(rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Loads [L, E], and slots, groups, nodes and devices: hierarchical and global, tied or not."""
    num_nodes, per_node, devices_a_node = (int(rng.choice([1, 2, 3, 4])) for _ in range(3))
    num_groups, num_devices = num_nodes * per_node, num_nodes * devices_a_node
    if rng.random() < 0.3:
        num_groups = num_groups + 1  # where nodes do not divide it the global policy is used
    num_experts = num_groups * int(rng.integers(1, 9))
    num_slots = num_devices * (-(-num_experts // num_devices) + int(rng.integers(0, 4)))
    shape = int(rng.integers(1, 4)), num_experts
    if rng.random() < 0.5:
        load_LE = rng.integers(0, 200, shape).astype(np.float32)
    else:
        load_LE = np.exp(1.5 * rng.normal(size=shape)).astype(np.float32)
    return load_LE, (num_slots, num_groups, num_nodes, num_devices)


def stable_sort(x: torch.Tensor, dim: int, descending: bool):
    return torch.sort(x, dim=dim, descending=descending, stable=True)


def main(argv: list[str]) -> None:
    torch.Tensor.sort = stable_sort
    spec = importlib.util.spec_from_file_location("eplb", Path(_CHECKOUT.value) / "eplb.py")
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    rng = np.random.default_rng(0)
    arrays = {name: [] for name in ("sizes", "loads", "slots", "replicas", "counts")}
    for _ in range(_CASES):
        load_LE, sizes = random_case(rng)
        output = published.rebalance_experts(torch.tensor(load_LE), *sizes)
        slots_LR, replicas_LEC, counts_LE = (tensor.numpy().astype(np.int16) for tensor in output)
        arrays["sizes"].append([*load_LE.shape, *sizes, replicas_LEC.shape[-1]])
        arrays["loads"].append(load_LE.reshape(-1))
        arrays["slots"].append(slots_LR.reshape(-1))
        arrays["replicas"].append(replicas_LEC.reshape(-1))
        arrays["counts"].append(counts_LE.reshape(-1))
    sizes = np.array(arrays.pop("sizes"), np.int16)
    flat = {name: np.concatenate(parts) for name, parts in arrays.items()}
    np.savez_compressed(_TARGET, sizes=sizes, **flat)
    print(f"{_TARGET}: {_TARGET.stat().st_size / 1024:.0f} KB")


if __name__ == "__main__":
    app.run(main)

"""What a checkpoint holds, from its manifest, its headers or its map alone.

python -m tools.inspect_checkpoint PATH, where PATH is
- a run's working directory, its checkpoints folder (the newest step is shown) or one step in it;
- a Hugging Face folder of safetensors;
- a bare model.safetensors.index.json with config.json beside it, or a map of names to shape, dtype
  and file (.json or .json.gz). With config.json beside it the experts a token activates are known.

Folders and maps are summed by dtype and by part of the model, and counted as in spec §1.1.
"""

import collections
import gzip
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dsv3_jax.checkpoint import hf, hf_config, hf_folder, manifest
from dsv3_jax.checkpoint.hf_folder import NUMPY_DTYPES, StoredTensor
from dsv3_jax.errors import UserError, run_main, some
from dsv3_jax.plan.parameters import count_parameters
from tools.text import aligned

# Part of the model by what its tensors' names contain; the first that fits counts.
_PARTS = (
    ("attention", ".self_attn."),
    ("routed experts", ".mlp.experts."),
    ("shared experts", ".mlp.shared_experts."),
    ("router", ".mlp.gate."),
    ("dense FFN", ".mlp."),
    ("embedding", "model.embed_tokens."),
    ("head", "lm_head."),
    ("norms", "norm."),
)
_ORDER = (*(part for part, _ in _PARTS), "MTP", "MTP copies", "other", "scales")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def array_table(contents: dict) -> list[str]:
    """Lines about a run's checkpoint: dtype and shape of every array, totals by first name."""
    rows = [("array", "dtype", "shape", "numbers", "bytes")]
    groups: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0, 0])
    for name, entry in contents["arrays"].items():
        count = math.prod(entry["shape"])
        num_bytes = count * np.dtype(entry["dtype"]).itemsize
        shape = " x ".join(map(str, entry["shape"])) or "scalar"
        rows.append((name, entry["dtype"], shape, f"{count:,}", f"{num_bytes:,}"))
        for group in (name.split(".")[0], "total"):
            for i, amount in enumerate((1, count, num_bytes)):
                groups[group][i] += amount
    rows.append(("",) * 5)
    for group, (arrays, count, num_bytes) in sorted(groups.items(), key=lambda g: g[0] == "total"):
        rows.append((group, "", f"{arrays:,} arrays", f"{count:,}", f"{num_bytes:,}"))
    return aligned(rows, num_left=3)


def read_map(path: Path) -> dict[str, StoredTensor]:
    """The tensors of an index or a parameter map, without the files that it names.

    An index gives no shapes: they come from the name table of the config.json beside it.

    Raises:
      UserError: it is neither, or the index has no config.json beside it.
    """
    try:
        raw = path.read_bytes()
        contents = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}); download it again") from None
    files: dict[str, Path] = {}

    def stored(name: str, dtype: str, shape: Iterable[int], file: str) -> StoredTensor:
        if file not in files:  # far fewer than tensors
            files[file] = path.parent / file
        shape = tuple(map(int, shape))
        return StoredTensor(name=name, dtype=dtype, shape=shape, file=files[file], offset=0)

    try:
        if "weight_map" not in contents:
            return {n: stored(n, e["dtype"], e["shape"], e["file"]) for n, e in contents.items()}
        placed = dict(contents["weight_map"])
        config = hf_folder.read_json(path.parent / "config.json")
        model = hf_config.read_model_config(config, str(path.parent / "config.json"))
        plain = {"float32": "f32"}.get(config.get("torch_dtype") or config.get("dtype"), "bf16")
        table = hf.tensors(model, "fp8" if config.get("quantization_config") else plain)
        if unknown := [name for name in placed if name not in table]:
            raise UserError(f"{path} names {some(unknown)}, which config.json does not describe")
        return {n: stored(n, table[n].dtype, table[n].shape, file) for n, file in placed.items()}
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f"{path} is neither an index of safetensors nor a map of names to shape, dtype and file"
        ) from None


def mtp_layers(tensors: Iterable[str]) -> set[str]:
    """Numbers of the layers that are MTP modules: those with a projection of two states."""
    return {_LAYER.match(name)[1] for name in tensors if name.endswith(".eh_proj.weight")}


def part_of(name: str, mtp: set[str]) -> str:
    """The part of the model that a tensor belongs to, one of `_ORDER`."""
    if name.endswith(hf.SCALE_SUFFIX):
        return "scales"
    layer = _LAYER.match(name)
    if layer and layer[1] in mtp:
        copy = name.endswith((".embed_tokens.weight", ".shared_head.head.weight"))
        return "MTP copies" if copy else "MTP"
    return next((part for part, text in _PARTS if text in name), "other")


def summary(tensors: dict[str, StoredTensor], parts: dict[str, str]) -> list[str]:
    """Lines: tensors, files, numbers and bytes by dtype, then by part, then of all."""
    groups: dict[str, list] = collections.defaultdict(lambda: [0, set(), 0, 0])
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMPY_DTYPES:
            raise UserError(f"{name} is {tensor.dtype}; allowed: {', '.join(NUMPY_DTYPES)}")
        numbers, num_bytes = tensor.size, tensor.num_bytes
        for key in (tensor.dtype, parts[name], "total"):
            group = groups[key]
            group[0] += 1
            group[1].add(tensor.file)
            group[2] += numbers
            group[3] += num_bytes

    def row(key: str) -> tuple[str, ...]:
        count, files, numbers, num_bytes = groups[key]
        return (key, *(f"{n:,}" for n in (count, len(files), numbers, num_bytes)))

    dtypes = [row(dtype) for dtype in NUMPY_DTYPES if dtype in groups]
    rows = [("dtype", "tensors", "files", "numbers", "bytes"), *dtypes, ("",) * 5]
    rows += [("part", "tensors", "files", "numbers", "bytes")]
    rows += [row(part) for part in _ORDER if part in groups]
    return aligned([*rows, row("total")], num_left=1)


def count(
    tensors: dict[str, StoredTensor], parts: dict[str, str], experts_per_token: int | None
) -> dict[str, int]:
    """The counts of spec §1.1 under their names in `ParameterCounts`, from names and shapes.

    Args:
      experts_per_token: None: what a token activates is left out.
    """
    size: dict[str, int] = collections.defaultdict(int)
    experts: dict[tuple[str, str], collections.Counter] = collections.defaultdict(
        collections.Counter
    )
    biases = 0
    for name, tensor in tensors.items():
        numbers = tensor.size
        size[parts[name]] += numbers
        if name.endswith(hf.SCALE_SUFFIX):
            continue
        if expert := _EXPERT.search(name):
            layer = ("MTP" if parts[name] == "MTP" else "main", _LAYER.match(name)[1])
            experts[layer][expert[1]] += numbers
        if name.endswith("e_score_correction_bias") and parts[name] != "MTP":
            biases += numbers
    total = sum(n for part, n in size.items() if part not in ("MTP", "MTP copies", "scales"))
    counts = {"total": total, "total_without_biases": total - biases, "mtp_unique": size["MTP"]}
    if experts_per_token is None:
        return counts
    idle = {"main": 0, "MTP": 0}
    for (kind, _), of_layer in experts.items():
        idle[kind] += sum(sorted(of_layer.values())[experts_per_token:])
    activated, ends = total - idle["main"], size["embedding"] + size["head"]
    return counts | {
        "activated": activated,
        "activated_without_embedding": activated - size["embedding"],
        "activated_without_embedding_and_head": activated - ends,
        "mtp_activated": size["MTP"] - idle["MTP"] + ends if size["MTP"] else 0,
    }


_LABELS = {
    "total": "main model, total",
    "total_without_biases": "  without selection biases",
    "activated": "activated by a token",
    "activated_without_embedding": "  without embedding",
    "activated_without_embedding_and_head": "  without embedding and head",
    "mtp_unique": "MTP, unique",
    "mtp_activated": "  activated, with embedding and head",
}


def describe(tensors: dict[str, StoredTensor], config: dict, where: str) -> list[str]:
    """All lines about a folder or a map."""
    mtp = mtp_layers(tensors)
    parts = {name: part_of(name, mtp) for name in tensors}
    lines = [*summary(tensors, parts), ""]
    model = hf_config.read_model_config(config, where) if config else None
    counts = count(tensors, parts, model and model.experts_per_token)
    shown = [(label, f"{counts[key]:,}") for key, label in _LABELS.items() if key in counts]
    lines += [*aligned(shown, num_left=1), ""]
    apart = sum(
        tensor.file != tensors[weight].file
        for name, tensor in tensors.items()
        if name.endswith(hf.SCALE_SUFFIX)
        and (weight := name.removesuffix(hf.SCALE_SUFFIX)) in tensors
    )
    lines.append(f"{apart:,} scales lie in another file than their weight")
    if model is None:
        return [*lines, "no config.json: what a token activates is not known"]
    expected = count_parameters(model)
    wrong = {k: e for k, n in counts.items() if n != (e := getattr(expected, k))}
    if not mtp:  # transformers saves no MTP module, but keeps its number in config.json
        wrong = {key: value for key, value in wrong.items() if not key.startswith("mtp")}
    if not wrong:
        return [*lines, "the counts are those of config.json"]
    return lines + [
        f"config.json describes another model: {key} {value:,}" for key, value in wrong.items()
    ]


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one path: python -m tools.inspect_checkpoint PATH")
    path = Path(argv[1])
    if path.is_file() or hf_folder.is_folder(path):
        if path.is_file():
            tensors, beside = read_map(path), path.parent / "config.json"
            config = hf_folder.read_json(beside) if beside.is_file() else {}
        else:
            folder = hf_folder.open_folder(path)
            tensors, config, beside = folder.tensors, folder.config, path / "config.json"
        print("\n".join(describe(tensors, config, str(beside))))
        return
    # This needs JAX, which takes longer to import than a map of 100,000 names to read.
    from dsv3_jax.checkpoint.reader import locate, steps_in

    directory, step = locate(path)
    step = steps_in(directory)[-1] if step is None else step
    try:
        contents = manifest.read(directory / str(step))
    except manifest.DamagedCheckpoint as error:
        raise UserError(f"step {step} in {directory}: {error}; name another step") from None
    files = contents["files"].values()
    print(
        f"step {step} in {directory}: {len(files)} files, {sum(f['bytes'] for f in files):,} bytes"
    )
    print("\n".join(array_table(contents)))


if __name__ == "__main__":
    run_main(main)

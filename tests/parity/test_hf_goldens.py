"""Checkpoint folders that other code wrote (tests/golden/hf): read, run, and written again."""

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from checkpoint.hf_random import ALIGNED, RAGGED, V2_LITE, write_random_folder
from flax import nnx
from golden import hf_cases
from parity.test_goldens import relative_difference, with_weights

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.hf_config import read_model_config

FP8, BF16, F32 = jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32
STORED = {
    "transformers_v3": "f32",
    "transformers_v2": "bf16",
    "released_fp8": "fp8",
    "released_bf16": "bf16",
}
# Keys of config.json that an export gives a value of its own.
OWN_KEYS = {"initializer_range", "max_position_embeddings", "num_nextn_predict_layers"}


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(hf_cases.FOLDER / name / "golden.npz"))


def stored_bytes(folder) -> dict[str, bytes]:
    """Every tensor's bytes, by the safetensors package."""
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= {
            n: bytes(entry["data"]) for n, entry in safetensors.deserialize(file.read_bytes())
        }
    return found


def assert_same_tensors(folder, name: str) -> None:
    golden, stored = golden_arrays(name), stored_bytes(folder)
    assert sorted(stored) == golden["tensor_names"].tolist()
    sums = {n: hashlib.sha256(data).digest() for n, data in stored.items()}
    expected = zip(golden["tensor_names"].tolist(), golden["tensor_sha256"], strict=True)
    assert [n for n, digest in expected if digest.tobytes() != sums[n]] == []


def run(model: DeepSeekV3, tokens_BT: np.ndarray) -> dict[str, np.ndarray]:
    """The logits that a golden file holds, by the same names."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def compute(state):
        model = nnx.merge(graphdef, state)
        main_BTD, mtp_hidden, _ = model.hidden_states(tokens_BT)
        return [model.logits(hidden) for hidden in (main_BTD, *mtp_hidden)]

    main, *mtp = map(np.asarray, compute(state))
    named = {f"mtp_logits_{k}": logits[:, :-k] for k, logits in enumerate(mtp, start=1)}
    return {"logits": main} | named


@pytest.mark.parametrize("name", hf_cases.CASES)
def test_logits_equal_those_of_the_other_code(name):
    golden = golden_arrays(name)
    model = DeepSeekV3.from_pretrained(hf_cases.FOLDER / name, dtype=F32)
    assert model.config == hf_cases.CASES[name].model

    ours = run(model, golden["tokens"])
    assert set(ours) == {key for key in golden if "logits" in key}
    differences = {key: relative_difference(ours[key], golden[key]) for key in ours}
    assert max(differences.values()) < 2e-5, differences


@pytest.mark.parametrize("name", [n for n in STORED if STORED[n] != "fp8"])
def test_every_weight_is_the_one_that_was_stored(name):
    case = hf_cases.CASES[name]
    stored = {"f32": np.float32, "bf16": ml_dtypes.bfloat16}[STORED[name]]
    model = DeepSeekV3.from_pretrained(hf_cases.FOLDER / name, dtype=F32)
    leaves = {".".join(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    expected = case.weights()
    assert set(leaves) == set(expected)
    for path, leaf in expected.items():
        if not path.endswith("router.bias"):
            leaf = leaf.astype(stored).astype(np.float32)
        np.testing.assert_array_equal(leaves[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("transformers_v3", F32),
        ("transformers_v2", BF16),
        ("transformers_v2", F32),
        ("released_fp8", F32),
        ("released_fp8", FP8),
        ("released_bf16", BF16),
        ("released_bf16", F32),
    ],
)
def test_import_and_export_give_the_same_bytes(name, dtype, tmp_path):
    source, target = hf_cases.FOLDER / name, tmp_path / "exported"
    model = DeepSeekV3.from_pretrained(source, dtype=dtype)
    model.save_pretrained(target, dtype=STORED[name])
    assert_same_tensors(target, name)

    theirs, ours = (json.loads((f / "config.json").read_text()) for f in (source, target))
    assert read_model_config(ours, "ours") == hf_cases.CASES[name].model
    shared = (set(theirs) & set(ours)) - OWN_KEYS
    assert {key: ours[key] for key in shared} == {key: theirs[key] for key in shared}


def test_float32_weights_are_quantised_as_torch_quantises_them(tmp_path):
    with_weights(hf_cases.CASES["released_fp8"]).save_pretrained(tmp_path / "fp8", dtype="fp8")
    assert_same_tensors(tmp_path / "fp8", "released_fp8")


@pytest.mark.parametrize("dtype", [pytest.param(F32, marks=pytest.mark.slow), FP8])
@pytest.mark.parametrize(
    ("values", "num_shards"),
    [(RAGGED, 3), (ALIGNED, 4), (V2_LITE, 1)],
    ids=["ragged", "aligned", "v2"],
)
def test_random_fp8_folder_comes_back_byte_for_byte(values, num_shards, dtype, tmp_path):
    stored = write_random_folder(
        tmp_path / "source", values=values, seed=7, num_shards=num_shards, recoverable=False
    )
    model = DeepSeekV3.from_pretrained(tmp_path / "source", dtype=dtype)
    model.save_pretrained(tmp_path / "target", dtype="fp8")
    exported = stored_bytes(tmp_path / "target")
    assert set(exported) == set(stored)
    assert [n for n, tensor in stored.items() if exported[n] != tensor.tobytes()] == []

"""Files from elsewhere run no code, and what is secret stays out of what a run writes."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hf_folder import open_folder
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import open_checkpoint
from dsv3_jax.config import SourceConfig
from dsv3_jax.data.sources import open_source
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import load_config
from dsv3_jax.train.workdir import RUN_FILE, open_workdir

ROOT = Path(__file__).parents[2]
# Modules whose loading runs code that the file names.
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickles(source: str) -> list[str]:
    """What in a program could unpickle a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] * ((node.module or "").partition(".")[0] in FORBIDDEN)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] * (name in ("torch.load", "read_pickle", "pd.read_pickle"))
            found += ["allow_pickle" for k in node.keywords if k.arg == "allow_pickle"]
    return found


def test_no_program_of_ours_unpickles():
    programs = [
        p for part in ("dsv3_jax", "experiments", "tools") for p in (ROOT / part).rglob("*.py")
    ]
    assert len(programs) > 100
    found = {
        str(p.relative_to(ROOT)): names for p in programs if (names := unpickles(p.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "def f():\n  import dill as d"]
    + ["torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)"],
)
def test_the_search_finds_each_way(source):
    assert unpickles(source)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.fixture
def payload(tmp_path):
    """A malicious file's bytes; whoever unpickled them is found out at the end."""
    marker = tmp_path / "executed"
    content = pickle.dumps(Payload(marker))
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    yield content
    assert not marker.exists()


def test_a_pickle_in_a_checkpoint(payload, tmp_path):
    """In place of each file in turn, with a manifest that vouches for it."""
    manager = CheckpointManager(tmp_path / "good", keep=1)
    manager.save(1, {"w": np.arange(6.0)}, {}, wait=True)
    manager.close()
    template = {"w": jax.ShapeDtypeStruct((6,), np.float64)}
    names = [
        p.relative_to(tmp_path / "good") for p in (tmp_path / "good").rglob("*") if p.is_file()
    ]
    assert len(names) >= 5
    for name in names:
        bad = tmp_path / "bad"
        shutil.copytree(tmp_path / "good", bad)
        body = manifest.read(bad / "1")
        (bad / name).write_bytes(payload)
        with pytest.raises(UserError, match=name.name):
            open_checkpoint(bad)
        if name.name != manifest.NAME:
            manifest.write(bad / "1", {k: v for k, v in body.items() if k != "files"})
            try:  # some files hold nothing that a restore needs
                state = open_checkpoint(bad).restore(template)
                np.testing.assert_array_equal(state["w"], np.arange(6.0))
            except Exception as error:
                assert not isinstance(error, AssertionError), name
        shutil.rmtree(bad)


def test_a_pickle_as_weights_tokenizer_or_data(payload, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(payload)
        with pytest.raises(UserError):
            open_folder(tmp_path)
    with pytest.raises(UserError):
        load_tokenizer(tmp_path / "model.safetensors")
    for kind in ("text", "jsonl", "parquet", "arrayrecord"):
        path = tmp_path / "model.safetensors"
        with pytest.raises(UserError):
            list(open_source(SourceConfig(kind=kind, path=str(path))))


def test_no_secret_of_the_environment_is_in_run_json(tmp_path, monkeypatch):
    for name in ("DSV3_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"secret of {name}")
    mesh = jax.make_mesh((1,), ("data",))
    open_workdir(load_config("tiny"), tmp_path, mesh)
    text = (tmp_path / RUN_FILE).read_text()
    assert "config" in json.loads(text) and "secret" not in text

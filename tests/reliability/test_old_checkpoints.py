"""Runs as earlier versions wrote them load, bit for bit."""

import json
import tarfile

import pytest

from dsv3_jax.checkpoint.pretrained import load_run_tokenizer, read_model
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import load_config
from tools.make_checkpoint_fixture import GOLDEN, restored_hash

FIXTURES = sorted(GOLDEN.glob("run_*.tar.xz"))


@pytest.mark.parametrize("archive", FIXTURES, ids=lambda path: path.name)
def test_every_format_loads(archive, tmp_path):
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    told = json.loads((GOLDEN / archive.name.replace(".tar.xz", ".json")).read_text())
    assert restored_hash(tmp_path, told["changes"]) == told["state_sha256"]
    assert read_model(tmp_path) == load_config("tiny", told["changes"]).model
    assert load_run_tokenizer(tmp_path).vocab_size == 300
    # What another model lacks or has besides is told by name.
    with pytest.raises(UserError, match=r"also holds opt_state.mean.mtp"):
        restored_hash(tmp_path, [*told["changes"], "model.mtp_depth=0"])
    with pytest.raises(UserError, match=r"lacks opt_state.*also holds opt_state.*attn.q_norm"):
        restored_hash(tmp_path, [*told["changes"], "model.q_latent_dim=none"])


def test_there_is_a_fixture():
    assert FIXTURES

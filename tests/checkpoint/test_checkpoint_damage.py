"""Damaged files: every one is noticed, named, and the step before is used."""

import random
import shutil

import numpy as np
import pytest

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import open_checkpoint, verify_step
from dsv3_jax.errors import UserError

FLIPS_PER_FILE = 70  # over 14 files or more: about 1,000


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pristine")
    manager = CheckpointManager(directory, keep=3)
    rng = np.random.default_rng(0)
    states = {}
    for step in (100, 200):
        states[step] = {
            "w": rng.normal(size=(32, 40)).astype(np.float32),
            "b": rng.normal(size=7).astype(np.float32),
        }
        manager.save(step, states[step], {"tokens": step}, wait=True)
    manager.close()
    return directory, {step: state_hash(state) for step, state in states.items()}


@pytest.fixture
def copy(pristine, tmp_path):
    shutil.copytree(pristine[0], tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def files_of(step_directory):
    return [p for p in sorted(step_directory.rglob("*")) if p.is_file()]


def assert_falls_back(directory, hashes, words):
    template = {"w": np.empty((32, 40), np.float32), "b": np.empty(7, np.float32)}
    checkpoint = open_checkpoint(directory)
    assert checkpoint.step == 100
    ((step, reason),) = checkpoint.rejected
    assert step == 200 and words in reason, reason
    assert state_hash(checkpoint.restore(template)) == hashes[100]


def test_intact_checkpoints_verify(pristine):
    directory, hashes = pristine
    assert open_checkpoint(directory).rejected == ()
    assert len(files_of(directory / "200")) >= 8
    template = {"w": np.empty((32, 40), np.float32), "b": np.empty(7, np.float32)}
    assert state_hash(open_checkpoint(directory).restore(template)) == hashes[200]


def test_every_flipped_bit_is_detected(copy, pristine):
    rng = random.Random(1)
    flips = 0
    for path in files_of(copy / "200"):
        intact = path.read_bytes()
        assert intact, path
        name = path.relative_to(copy / "200").as_posix()
        for trial in range(FLIPS_PER_FILE):
            damaged = bytearray(intact)
            damaged[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            with pytest.raises(manifest.DamagedCheckpoint, match=path.name):
                verify_step(copy / "200")
            flips += 1
            if trial == 0:
                assert_falls_back(copy, pristine[1], name)
        path.write_bytes(intact)
    assert flips >= 8 * FLIPS_PER_FILE
    verify_step(copy / "200")


@pytest.mark.parametrize("damage", ["truncate", "empty", "append", "delete", "add", "swap"])
def test_other_damage_to_every_file(copy, pristine, damage):
    for path in files_of(copy / "200"):
        if damage == "swap" and path.name == manifest.NAME:
            continue  # the case of a manifest from another step is below
        intact = path.read_bytes()
        name, words = path.name, path.name
        if damage == "truncate":
            path.write_bytes(intact[:-1])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "append":
            path.write_bytes(intact + b"\n")
        elif damage == "delete":
            path.unlink()
            words = f"{name} is missing"
        elif damage == "add":
            path.with_name("stray").write_bytes(b"x")
            words = "stray does not belong to it"
        elif damage == "swap":
            path.write_bytes(bytes(len(intact)))
        assert_falls_back(copy, pristine[1], words)
        path.write_bytes(intact)
        path.with_name("stray").unlink(missing_ok=True)
    verify_step(copy / "200")


def test_a_step_under_another_number_or_manifest_is_rejected(copy, pristine):
    (copy / "200" / manifest.NAME).write_bytes((copy / "100" / manifest.NAME).read_bytes())
    assert_falls_back(copy, pristine[1], "")
    shutil.rmtree(copy / "200")
    shutil.copytree(copy / "100", copy / "200")
    assert_falls_back(copy, pristine[1], "saved as step 100")


def test_nothing_valid_is_an_error_that_names_every_reason(copy):
    for step in ("100", "200"):
        (copy / step / manifest.NAME).unlink()
    with pytest.raises(UserError) as error:
        open_checkpoint(copy)
    for words in ("step 100", "step 200", "MANIFEST.json is missing", str(copy)):
        assert words in str(error.value)
    with pytest.raises(UserError, match="step 100"):
        open_checkpoint(copy, step=100)


def test_numbers_that_read_back_wrong_are_named(copy):
    """The files are what was written, yet an array differs: only its own digest can tell."""
    contents = manifest.read(copy / "200")
    contents["small_leaves"]["b"] = "00000000"
    manifest.write(copy / "200", {k: v for k, v in contents.items() if k != "files"})
    template = {"w": np.empty((32, 40), np.float32), "b": np.empty(7, np.float32)}
    with pytest.raises(UserError, match="b read back as other numbers"):
        open_checkpoint(copy).restore(template)

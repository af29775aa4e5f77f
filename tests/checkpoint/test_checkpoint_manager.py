"""Saving, restoring, retention, left-overs and failing writes."""

import dataclasses
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint import manifest
from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.checkpoint.reader import locate, open_checkpoint, steps_in
from dsv3_jax.errors import UserError

ROOT = Path(__file__).parents[2]
EXTRA = {"tokens": 123456789012, "data": {"position": [3, 4]}, "rate": 0.1, "name": "é"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict
    moments: tuple


def mesh_of(data: int, expert: int) -> Mesh:
    devices = np.array(jax.devices()[: data * expert])
    return Mesh(devices.reshape(1, data, expert), ("pipe", "data", "expert"))


def template_on(mesh: Mesh) -> State:
    def leaf(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    return State(
        step=leaf((), jnp.int32),
        params={
            "experts": leaf((8, 24, 40), jnp.float32, "expert"),
            "table": leaf((64, 16), jnp.float32),
            "bias": leaf((3, 8), jnp.float32),
        },
        moments=(
            leaf((8, 24, 40), jnp.bfloat16, "expert", "data"),
            leaf((64, 16), jnp.bfloat16, ("data", "expert")),
        ),
    )


def make_state(mesh: Mesh, seed: int) -> State:
    rng = np.random.default_rng(seed)

    def fill(leaf):
        values = rng.normal(size=leaf.shape) * 1000
        return jax.device_put(np.asarray(values).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, template_on(mesh))


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(2, 4)


def test_round_trip_is_exact_and_the_state_may_be_donated_at_once(tmp_path, mesh):
    state = make_state(mesh, 0)
    host = jax.device_get(state)
    expected = state_hash(state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    manager = CheckpointManager(tmp_path, keep=2, config_digest="abc")
    manager.save(5, state, EXTRA)
    for _ in range(5):
        state = step(state)  # overwrites the buffers while the save goes on
    manager.wait()
    assert manager.latest_step() == 5
    restored, extra, number = manager.restore(template_on(mesh))
    assert (number, extra, manager.rejected) == (5, EXTRA, ())
    chex.assert_trees_all_equal(jax.device_get(restored), host)
    chex.assert_trees_all_equal_dtypes(restored, template_on(mesh))
    assert state_hash(restored) == expected != state_hash(state)
    assert open_checkpoint(tmp_path).contents["config_digest"] == "abc"
    manager.close()


def test_state_hash_sees_names_types_shapes_and_bits(mesh):
    state = make_state(mesh, 1)
    table = np.array(state.params["table"])
    assert state_hash(state) == state_hash(jax.device_get(state))
    variants = [
        {"table": table},
        {"tabel": table},
        {"table": table.T},
        {"table": table.reshape(-1)},
        {"table": table.view(np.int32)},
        {"table": np.nextafter(table, np.inf)},
        {"table": table, "more": table},
    ]
    assert len({state_hash(v) for v in variants}) == len(variants)
    assert state_hash({"x": np.float32(0.0)}) != state_hash({"x": np.float32(-0.0)})


def test_restores_on_other_meshes_with_the_same_hash(tmp_path, mesh):
    state = make_state(mesh, 2)
    expected = state_hash(state)
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, state, {}, wait=True)
    for shape in [(1, 1), (1, 8), (4, 2), (8, 1), (2, 4), (1, 2)]:
        template = template_on(mesh_of(*shape))
        restored, _, _ = manager.restore(template)
        assert state_hash(restored) == expected, shape
        jax.tree.map(lambda x, t: chex.assert_equal(x.sharding, t.sharding), restored, template)
    manager.save(2, restored, {}, wait=True)  # and back from the last one
    assert state_hash(manager.restore(template_on(mesh))[0]) == expected
    manager.close()


def test_numpy_leaves_and_partial_restore(tmp_path, mesh):
    state = {"train": make_state(mesh, 3), "ema": {"table": np.random.rand(64, 16)}}
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, state, {}, wait=True)
    manager.close()
    template = {
        "train": {"params": {"table": template_on(mesh_of(1, 1)).params["table"]}},
        "ema": {"table": jax.ShapeDtypeStruct((64, 16), np.float64)},
    }
    restored = open_checkpoint(tmp_path).restore(template, partial=True)
    assert isinstance(restored["ema"]["table"], np.ndarray)
    np.testing.assert_array_equal(restored["ema"]["table"], state["ema"]["table"])
    np.testing.assert_array_equal(
        restored["train"]["params"]["table"], state["train"].params["table"]
    )


def test_a_template_that_does_not_fit_is_named(tmp_path, mesh):
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, make_state(mesh, 4), {}, wait=True)
    template = template_on(mesh)
    table = template.params.pop("table")
    template.params["tabel"] = table
    template.params["bias"] = jax.ShapeDtypeStruct((3, 9), np.float32)
    template.moments = (template.moments[0], table)
    with pytest.raises(UserError) as error:
        manager.restore(template)
    for words in (
        "lacks params.tabel",
        "also holds params.table",
        "params.bias float32[3, 8] where float32[3, 9] is expected",
        "moments.1 bfloat16[64, 16] where float32[64, 16]",
    ):
        assert words in str(error.value)
    manager.close()


def test_empty_directory_has_nothing_to_restore(tmp_path, mesh):
    manager = CheckpointManager(tmp_path / "new" / "folder", keep=1)
    assert manager.restore(template_on(mesh)) is None
    assert manager.latest_step() is None
    with pytest.raises(UserError, match="no valid step 3"):
        manager.restore(template_on(mesh), step=3)
    manager.close()


def test_retention_keeps_the_newest(tmp_path, mesh):
    manager = CheckpointManager(tmp_path, keep=2)
    hashes = {}
    for step in (1, 2, 3, 10):
        state = make_state(mesh, step)
        hashes[step] = state_hash(state)
        manager.save(step, state, {"step": step})
    manager.wait()
    assert steps_in(tmp_path) == [3, 10]
    for step in (3, 10):
        restored, extra, found = manager.restore(template_on(mesh), step=step)
        assert (state_hash(restored), extra["step"], found) == (hashes[step], step, step)
    manager.save(10, make_state(mesh, 77), {"step": "again"}, wait=True)  # replaces step 10
    assert manager.restore(template_on(mesh))[1:] == ({"step": "again"}, 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "3"]
    manager.close()


def test_a_rejected_step_neither_counts_as_kept_nor_stays_in_the_way(tmp_path, mesh):
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (100, 200):
        manager.save(step, make_state(mesh, step), {}, wait=True)
    (tmp_path / "200" / "_METADATA").unlink()
    manager.close()
    manager = CheckpointManager(tmp_path, keep=1)
    assert manager.restore(template_on(mesh))[2] == 100
    assert manager.rejected[0][0] == 200 and "_METADATA is missing" in manager.rejected[0][1]
    manager.save(150, make_state(mesh, 150), {}, wait=True)
    assert steps_in(tmp_path) == [150, 200]  # the newest by number is not the newest that is good
    assert manager.restore(template_on(mesh))[2] == 150
    manager.close()
    manager = CheckpointManager(tmp_path, keep=2)
    assert manager.restore(template_on(mesh))[2] == 150
    manager.save(300, make_state(mesh, 300), {}, wait=True)
    assert steps_in(tmp_path) == [150, 300]
    manager.close()


def test_a_rejected_step_that_is_saved_anew_counts_again(tmp_path, mesh):
    manager = CheckpointManager(tmp_path, keep=2)
    for step in (100, 200):
        manager.save(step, make_state(mesh, step), {}, wait=True)
    (tmp_path / "200" / "_METADATA").unlink()
    assert manager.restore(template_on(mesh))[2] == 100
    manager.save(200, make_state(mesh, 201), {}, wait=True)
    manager.save(300, make_state(mesh, 300), {}, wait=True)
    assert steps_in(tmp_path) == [200, 300]
    assert open_checkpoint(tmp_path, 200).step == 200
    manager.close()


def test_leftovers_of_a_killed_save_are_removed_on_start(tmp_path, mesh):
    manager = CheckpointManager(tmp_path, keep=3)
    for step in (1, 2):
        manager.save(step, make_state(mesh, step), {}, wait=True)
    manager.close()
    (tmp_path / "2").rename(tmp_path / "replaced.2")  # killed between the renames of a replacement
    for name in ("pending.3", "pending.3.orbax-checkpoint-tmp", "deleting.0"):
        (tmp_path / name / "d").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    manager = CheckpointManager(tmp_path, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "notes"]
    assert manager.restore(template_on(mesh))[2] == 2
    manager.close()


def test_unwritable_directory_is_named(tmp_path, mesh):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/checkpoints cannot be written"):
        CheckpointManager(tmp_path / "file" / "checkpoints", keep=1)


def test_a_save_that_cannot_start_says_so_and_a_later_one_may_succeed(tmp_path, mesh):
    directory = tmp_path / "checkpoints"
    manager = CheckpointManager(directory, keep=3)
    manager.save(1, make_state(mesh, 1), {}, wait=True)
    directory.rename(tmp_path / "away")
    directory.write_text("")  # nothing can be made below a file, whoever we are
    with pytest.raises(UserError, match="saving checkpoint 2 in .*/checkpoints failed"):
        manager.save(2, make_state(mesh, 2), {})
    directory.unlink()
    (tmp_path / "away").rename(directory)
    manager.save(3, make_state(mesh, 3), {}, wait=True)
    assert steps_in(directory) == [1, 3]
    assert manager.restore(template_on(mesh), step=1)[2] == 1
    manager.close()


def test_a_disk_that_fills_up_is_reported_by_the_next_call(tmp_path):
    """A limit on file sizes stands for a full disk: the write fails half-way."""
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("needs RLIMIT_FSIZE")
    code = f"""
        import resource
        import numpy as np
        from dsv3_jax.checkpoint.manager import CheckpointManager
        from dsv3_jax.errors import UserError
        manager = CheckpointManager({str(tmp_path)!r}, keep=2)
        manager.save(1, {{"w": np.random.rand(10)}}, {{}}, wait=True)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
        manager.save(2, {{"w": np.random.rand(100_000)}}, {{}})
        try:
            manager.save(3, {{"w": np.random.rand(10)}}, {{}})
        except UserError as error:
            print(error)
        manager.save(4, {{"w": np.random.rand(10)}}, {{}})
        manager.close()
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert f"saving checkpoint 2 in {tmp_path} failed" in run.stdout
    assert "File too large" in run.stdout and len(run.stdout.splitlines()) == 1
    assert "Traceback" not in run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "4"]
    assert open_checkpoint(tmp_path, step=1).step == 1


def test_locate_accepts_every_level(tmp_path, mesh):
    directory = tmp_path / "run" / "checkpoints"
    manager = CheckpointManager(directory, keep=1)
    manager.save(7, make_state(mesh, 7), {}, wait=True)
    manager.close()
    assert locate(tmp_path / "run") == locate(directory) == (directory, None)
    assert locate(directory / "7") == (directory, 7)
    for path, words in [(tmp_path, "holds no checkpoint"), (tmp_path / "x", "does not exist")]:
        with pytest.raises(UserError, match=words):
            locate(path)
    assert manifest.read(directory / "7")["step"] == 7

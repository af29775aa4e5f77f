"""One of two processes with four devices each, run by test_checkpoint_processes.py.

python process_worker.py PORT INDEX DIRECTORY
"""

import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.errors import UserError
from dsv3_jax.train.ema import HostEma, ema_template


def make(mesh, seed):
    rng = np.random.default_rng(seed)
    specs = {"experts": PartitionSpec("expert", "data"), "table": PartitionSpec()}
    host = {"experts": rng.normal(size=(8, 16, 8)), "table": rng.normal(size=(40, 8))}
    return {
        name: jax.make_array_from_callback(
            host[name].shape,
            NamedSharding(mesh, spec),
            lambda index, name=name: host[name].astype(np.float32)[index],
        )
        for name, spec in specs.items()
    }


def template_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check_failed_save(manager, step, state, *, fails):
    """The system lets one process write no file that is as large; both hear of it, and soon."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if fails:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    started = time.monotonic()
    try:
        manager.save(step, state, {"step": step}, wait=True)
    except UserError as error:
        message = str(error)
    else:
        raise AssertionError("saved without room")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"saving checkpoint {step} in" in message, message
    assert message.startswith("process ") != fails, message
    assert time.monotonic() - started < 30


def main(port: str, index: str, directory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    devices = np.array(jax.devices())
    assert devices.size == 8 and len(jax.local_devices()) == 4
    mesh = Mesh(devices.reshape(1, 2, 4), ("pipe", "data", "expert"))
    manager = CheckpointManager(directory, keep=2)
    ema = HostEma(make(mesh, 0), 0.9)
    saved = []
    for step in (1, 2, 3):
        params = make(mesh, step)
        ema.update(params)
        state = {"params": params, "ema": ema.value()}
        saved.append((state, state_hash(state)))
        manager.save(step, state, {"step": step})
    # A value that a checkpoint is still writing must not follow later updates.
    assert all(state_hash(state) == digest for state, digest in saved)
    expected = saved[-1][1]
    manager.wait()
    if index == "0":
        next(p for p in Path(directory, "3").rglob("*") if p.stat().st_size > 500).write_bytes(b"")

    other = Mesh(devices.reshape(1, 4, 2), ("pipe", "data", "expert"))
    restored_ema = HostEma(make(other, 9), 0.9)
    params = template_of(make(other, 9))
    template = {"params": params, "ema": ema_template(params)}
    state, extra, step = manager.restore(template)
    assert (step, extra) == (2, {"step": 2}), (step, extra)
    restored_ema.restore(state["ema"])
    restored_ema.update(make(other, 3))
    state = {"params": make(other, 3), "ema": restored_ema.value()}
    assert state_hash(state) == expected
    manager.save(4, state, {"step": 4}, wait=True)
    assert state_hash(manager.restore(template)[0]) == expected
    for step, failing in ((5, "1"), (6, "0")):
        check_failed_save(manager, step, state, fails=index == failing)
    manager.save(7, state, {"step": 7}, wait=True)
    assert state_hash(manager.restore(template)[0]) == expected
    manager.close()
    if index == "0":
        assert sorted(p.name for p in Path(directory).iterdir()) == ["4", "7"]
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])

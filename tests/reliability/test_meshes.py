"""A state saved on one mesh goes on on every other: the same bits, and the same next step.

The state is a trained one, the meshes differ in pipeline ranks, data, experts and layout.
"""

from dataclasses import replace
from itertools import permutations

import chex
import jax
import numpy as np
import pytest
from small_model import SMALL_MODEL

from dsv3_jax import configs
from dsv3_jax.checkpoint.hashing import state_hash
from dsv3_jax.checkpoint.manager import CheckpointManager
from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_train_step

pytestmark = pytest.mark.slow
# pipe, data, expert, layout: 5 meshes, 20 pairs
MESHES = (
    (1, 1, 1, "zero1_ep"),
    (1, 8, 1, "zero1_ep"),
    (1, 2, 4, "fsdp_ep"),
    (1, 1, 8, "fsdp_ep"),
    (2, 2, 2, "zero1_ep"),
)
MODEL = replace(SMALL_MODEL, num_layers=5)
SCALARS = np.float32(1e-3), np.float32(1e-3), np.float32(0.3)


class OnMesh:
    """The step of one mesh, compiled once."""

    def __init__(self, mesh, folder):
        pipe, data, expert, layout = mesh
        tiny = configs.get("tiny")
        self.config = replace(
            tiny,
            model=MODEL,
            parallel=replace(tiny.parallel, pipe=pipe, data=data, expert=expert, layout=layout),
            precision=replace(tiny.precision, compute="float32", moments="float32", remat="none"),
            data=replace(tiny.data, sequence_length=8, sequences_per_step=32),
        )
        self.mesh = make_mesh(self.config.parallel)
        self.graphdef, self.template = abstract_state(self.config, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.template)
        self._step = make_train_step(self.config, self.graphdef, shardings)
        self.manager = CheckpointManager(folder, keep=1)

    def step(self, state, seed):
        """The state after the batch of a seed, and the loss on it; `state` is taken."""
        tokens = np.random.default_rng(seed).integers(0, MODEL.vocab_size, (4, 8, 9))
        sharding = batch_sharding(self.mesh, leading=1)
        batch = jax.device_put({"tokens": tokens.astype(np.int32)}, sharding)
        state, metrics = self._step(state, batch, *SCALARS)
        return state, float(metrics["loss"])


@pytest.fixture(scope="module")
def on_mesh(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    return {mesh: OnMesh(mesh, folder / str(i)) for i, mesh in enumerate(MESHES)}


@pytest.fixture(scope="module")
def saved(on_mesh):
    """Of each mesh: the digest of its checkpoint after two steps, and the next step's loss."""
    found = {}
    for mesh, run in on_mesh.items():
        _, state, _ = init_state(run.config, run.mesh)
        for seed in (0, 1):
            state, _ = run.step(state, seed)
        run.manager.save(2, vars(state), {}, wait=True)
        digest = state_hash(vars(state))
        found[mesh] = digest, run.step(state, 2)[1]
    return found


@pytest.mark.parametrize(("origin", "target"), list(permutations(MESHES, 2)))
def test_state_and_next_loss(on_mesh, saved, origin, target):
    run, (digest, loss) = on_mesh[target], saved[origin]
    tree, _, step = on_mesh[origin].manager.restore(vars(run.template))
    assert step == 2 and state_hash(tree) == digest
    jax.tree.map(lambda x, t: chex.assert_equal(x.sharding, t.sharding), tree, vars(run.template))
    _, next_loss = run.step(type(run.template)(**tree), 2)
    assert abs(next_loss - loss) <= 1e-6 * loss, (next_loss, loss)

"""Training in FP8 loses nothing that bfloat16 would have learned (spec §5.7), at its smallest."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from small_run import MODEL, SPEED, WEIGHT, make_batch, make_config, make_mesh

from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.train.compare import relative_gaps
from dsv3_jax.train.state import abstract_state, init_state
from dsv3_jax.train.step import make_train_step

NUM_STEPS = 50
# Up for 5 steps, then down to 0: at a constant rate the last losses are noise.
RATES = 0.003 * np.minimum(np.arange(1, NUM_STEPS + 1) / 5, 1)
RATES *= 1 - np.arange(NUM_STEPS) / NUM_STEPS


def losses(config, starts, corpora):
    """Training losses of a run for every first state and its batches."""
    mesh = make_mesh()
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    step = make_train_step(config, graphdef, shardings)
    curves = []
    for start, batches in zip(starts, corpora, strict=True):
        state, curve = jax.device_put(start, shardings), []
        for batch, rate in zip(batches, RATES.astype(np.float32), strict=True):
            batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
            state, metrics = step(state, batch, rate, SPEED, WEIGHT)
            curve.append(metrics["loss"])
        curves.append(np.array(jax.device_get(curve)))
    return curves


@pytest.mark.slow
def test_fp8_ends_within_half_a_percent_of_bfloat16():
    """Two runs: each gap alone varies by 0.2 % with the rounding of either precision.

    Wgrad with scales along the wrong axis ends 0.7 to 1.4 % above.
    """
    model = replace(MODEL, num_layers=1, num_dense_layers=0, mtp_depth=0)
    config = make_config(model=model)
    starts = [
        jax.device_get(init_state(replace(config, run=replace(config.run, seed=s)), make_mesh())[1])
        for s in range(2)
    ]
    corpora = [[make_batch(8) for _ in RATES] for _ in starts]
    theirs, ours = (
        losses(make_config(compute, model=model), starts, corpora)
        for compute in ("bfloat16", "fp8")
    )
    for curve in theirs:
        assert curve[-1] < 0.4 * curve[0]
    gaps = [relative_gaps(a, b)[-1] for a, b in zip(ours, theirs, strict=True)]
    assert abs(np.mean(gaps)) < 0.005, gaps
    assert all(gaps), "FP8 was not used"

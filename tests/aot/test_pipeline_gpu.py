"""The pipeline compiled for H200s that are not there: overlap, memory, copies."""

import importlib.util

import jax
import pytest
import v3_step
from fused_layers import RING_BYTES, lower_fused_layers

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.plan import aot, hlo, overlap
from dsv3_jax.plan.chips import get_chip

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
        reason="needs the GPU compiler: pip install 'dsv3-jax[aot]'",
    ),
]
MESHES = {
    "h200:1x1x8": ParallelConfig(pipe=2, data=2, expert=2),
    "h200:128x1x8": ParallelConfig(pipe=16, expert=64),
}


@pytest.fixture(autouse=True)
def precision_of_a_run():
    """The rest of the suite asks for float32 products, which take other kernels, or none."""
    with jax.default_matmul_precision("default"):
        yield


# cuBLAS calls and Triton kernels are scheduled by different costs.
@pytest.mark.parametrize("topology, triton", zip(MESHES, (True, False), strict=True))
def test_every_forward_all_to_all_spans_a_backward_matmul(topology, triton):
    mesh = aot.described_mesh(topology, MESHES[topology])
    options = aot.overlap_options(mesh) | {"xla_gpu_enable_triton_gemm": triton}
    program = hlo.parse(lower_fused_layers(mesh).compile(options).as_text())
    moves = overlap.in_fused_bodies(overlap.transfers(program))
    forward = [move for move in moves if move.scope == "forward"]
    assert len(forward) == 3, moves  # choices, rows, combine
    assert all(move.asynchronous and move.other_chunk_matmuls for move in forward), moves
    assert overlap.copies_of(program, RING_BYTES) == []


def test_the_671b_step_on_1024_gpus_overlaps_and_fits():
    """Full width, 4096 tokens a device, optimizer state included; minutes of compilation."""
    program, memory = v3_step.compile_for(v3_step.config(32), "h200:128x1x8")
    assert memory.aliased > 0.99 * memory.outputs  # the state is donated
    assert memory.arguments < memory.peak
    assert memory.fits(get_chip("h200").hbm_bytes, 0.9), memory
    moves = [
        move
        for move in overlap.in_fused_bodies(overlap.transfers(program))
        if move.num_bytes >= v3_step.ROWS
    ]
    # The MTP module's own forward and backward stand in one loop, too, one after the other.
    forward = [move for move in moves if move.scope == "forward"]
    shared = max(forward, key=lambda move: move.matmuls.get("backward", 0)).computation
    forward = [move for move in forward if move.computation == shared]
    assert len(forward) == 2, moves  # dispatch and combine
    assert all(move.asynchronous and move.other_chunk_matmuls for move in forward), moves
    assert overlap.copies_of(program, v3_step.RING) == []


def test_unknown_shape_is_refused():
    with pytest.raises(UserError, match=r"h200:128x8.*h200:256x1x8"):
        aot.described_mesh("h200:128x8", ParallelConfig())
    with pytest.raises(UserError, match="has 16 devices but .* uses 8"):
        aot.described_mesh("h200:2x1x8", ParallelConfig(expert=8))

"""The pipeline compiled for TPU slices that are not there: overlap, memory, copies."""

import importlib.util

import jax
import pytest
import v3_step
from fused_layers import RING_BYTES, lower_fused_layers

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.plan import aot, hlo, overlap

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: pip install 'dsv3-jax[aot]'",
    ),
]
MESHES = {
    "v5p:2x2x2": ParallelConfig(pipe=2, data=2, expert=2),
    "v5p:8x8x16": ParallelConfig(pipe=16, expert=64),
}


@pytest.fixture(autouse=True)
def precision_of_a_run():
    """The rest of the suite asks for float32 products, which take other kernels, or none."""
    with jax.default_matmul_precision("default"):
        yield


def compiled_program(topology):
    mesh = aot.described_mesh(topology, MESHES[topology])
    return hlo.parse(aot.compile_step(lower_fused_layers(mesh), mesh).as_text())


@pytest.mark.parametrize("topology", MESHES)
def test_all_to_alls_are_asynchronous_and_the_forward_ones_span_backward_matmuls(topology):
    program = compiled_program(topology)
    moves = overlap.in_fused_bodies(overlap.transfers(program))
    forward = [move for move in moves if move.scope == "forward"]
    assert len(forward) == 3, moves  # choices, rows, combine
    assert sum(move.asynchronous for move in moves) >= 4, moves
    assert any(move.other_chunk_matmuls for move in forward), moves
    assert overlap.copies_of(program, RING_BYTES) == []


def test_the_671b_step_on_1024_chips_is_asynchronous_and_fits():
    """Full width, 4096 tokens a device, optimizer state included; minutes of compilation."""
    program, memory = v3_step.compile_for(v3_step.config(32, max_deferred=0), "v5p:8x8x16")
    assert memory.aliased > 0.99 * memory.outputs  # the state is donated
    moves = [
        move
        for move in overlap.in_fused_bodies(overlap.transfers(program))
        if move.num_bytes >= v3_step.ROWS
    ]
    assert sum(move.asynchronous for move in moves) >= 4, moves
    assert overlap.copies_of(program, v3_step.RING) == []


def test_program_that_does_not_fit_is_refused():
    mesh = aot.described_mesh("v5e:2x4", MESHES["v5p:2x2x2"])
    with pytest.raises(UserError, match="does not fit: .* memory"):
        aot.compile_step(lower_fused_layers(mesh, rows=2**13), mesh)


def test_unknown_shape_is_refused():
    with pytest.raises(UserError, match=r"v5p:3x3x3"):
        aot.described_mesh("v5p:3x3x3", ParallelConfig())

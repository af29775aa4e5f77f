"""Which device holds which tokens, and which process reads which rows, with a `context` axis."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax.config import ParallelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.context import (
    flat_tokens,
    num_context_shards,
    token_axes,
    token_spec,
    unflat_tokens,
)
from dsv3_jax.parallel.mesh import abstract_mesh, data_process, make_mesh
from dsv3_jax.parallel.rules import optimizer_sharding, weight_sharding


def test_the_axis_is_there_only_where_sequences_are_split():
    whole, split = (
        abstract_mesh(ParallelConfig(pipe=1, data=2, expert=2, context=c)) for c in (1, 2)
    )
    assert whole.axis_names == ("pipe", "data", "expert")
    assert split.axis_names == ("pipe", "data", "context", "expert")
    assert [num_context_shards(split, tokens) for tokens in (8, 6, 1)] == [2, 1, 1]
    assert (token_spec(split, 8), token_spec(split, 6)) == (
        P(("data", "expert"), "context"), P(("data", "expert")),
    )  # fmt: skip
    assert token_axes(whole) == ("data", "expert") == token_axes(split, 6)
    assert token_axes(split) == ("data", "expert", "context") == token_axes(split, 8)


def test_a_mesh_larger_than_the_devices_names_its_axes():
    axes = "the mesh pipe 1 x data 1 x context 64 x expert 2 needs 128 devices"
    keys = "parallel.pipe, parallel.data, parallel.context and parallel.expert"
    with pytest.raises(UserError, match=f"{axes} .*{keys}"):
        make_mesh(ParallelConfig(context=64, expert=2))


def test_flat_tokens_stay_where_they_are_and_come_back():
    mesh = make_mesh(ParallelConfig(data=2, context=2, expert=2))
    x_BTD = jnp.arange(8 * 4 * 3.0).reshape(8, 4, 3)

    @jax.jit
    def there_and_back(x_BTD):
        x_XD = flat_tokens(x_BTD, mesh)
        return x_XD, unflat_tokens(x_XD, 4, mesh)

    flat, back = there_and_back(x_BTD)
    np.testing.assert_array_equal(back, x_BTD)
    # Device (data 0, expert 0) has two rows, of which context 0 has two tokens each.
    np.testing.assert_array_equal(flat[:4], x_BTD[:2, :2].reshape(4, 3))
    np.testing.assert_array_equal(flat[4:8], x_BTD[:2, 2:].reshape(4, 3))


def test_weights_and_moments_are_split_over_it_as_over_a_data_axis():
    mesh = abstract_mesh(ParallelConfig(data=2, context=2, expert=2))
    dense, experts = ("embed", "ffn"), ("expert", "expert_embed", "expert_ffn")
    everyone = ("data", "context", "expert")
    sharded = weight_sharding(mesh, (16, 6), dense, "fsdp_ep")
    assert sharded.spec == P(everyone, None)
    assert weight_sharding(mesh, (8, 16, 6), experts, "fsdp_ep").spec == P(
        "expert", ("data", "context"), None
    )
    replicated = weight_sharding(mesh, (16, 6), dense, "zero1_ep")
    assert replicated.spec == P(None, None)
    assert optimizer_sharding(replicated, (16, 6)).spec == P(everyone, None)
    assert optimizer_sharding(replicated, (4, 6)).spec == P(("data", "context"), None)


def mesh_of_processes(devices_each, **sizes):
    """A mesh whose devices, in order, belong to processes of so many."""
    sizes = {"pipe": 1, "data": 1, "context": 1, "expert": 1} | sizes
    shape = tuple(sizes.values())
    devices = [SimpleNamespace(process_index=i // devices_each) for i in range(np.prod(shape))]
    return SimpleNamespace(devices=np.array(devices).reshape(shape), shape=sizes)


@pytest.mark.parametrize(
    ("devices_each", "sizes", "parts"),
    [
        (2, {"context": 2, "expert": 2}, [(0, 1), (0, 1)]),  # other tokens of the same rows
        (1, {"context": 2, "expert": 2}, [(0, 2), (1, 2), (0, 2), (1, 2)]),
        (4, {"data": 2, "context": 2, "expert": 2}, [(0, 2), (1, 2)]),
        (2, {"pipe": 2, "data": 2, "expert": 2}, [(0, 2), (1, 2), (0, 2), (1, 2)]),
    ],
)
def test_processes_with_the_same_sequences_read_the_same_rows(
    monkeypatch, devices_each, sizes, parts
):
    mesh = mesh_of_processes(devices_each, **sizes)
    for process, part in enumerate(parts):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert data_process(mesh) == part


def test_processes_with_a_part_of_each_others_sequences_are_refused():
    with pytest.raises(UserError, match="make the devices of a process a multiple or a divisor"):
        data_process(mesh_of_processes(2, context=2, expert=3))

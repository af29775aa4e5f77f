"""Topologies by name, and meshes for them."""

import math
import re

import pytest

from dsv3_jax.configs import get
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import load_config
from dsv3_jax.plan.topology import changes, check_mesh, meshes, parse_topology, with_mesh

V3 = "deepseek_v3_671b"


@pytest.mark.parametrize(
    "name, devices",
    [("h200:128x1x8", 1024), ("v5p:8x8x16", 1024), ("v5e:16x16", 256), ("tpu7x:8x8x16", 2048)],
)
def test_devices_are_counted(name, devices):
    where = parse_topology(name)
    assert where.num_devices == devices and where.chip.name == name.partition(":")[0]


@pytest.mark.parametrize(
    "name, problem",
    [
        ("h20:1x1x8", "did you mean 'h200'"),
        ("h200", "slices x hosts x GPUs, e.g. h200:256x1x8"),
        ("h200:8x8", "give 3 numbers"),
        ("v5e:8x8x8", "give 2 numbers, chips along each side, e.g. v5e:16x16"),
        ("v5p:0x8x8", "'0x8x8' is no shape"),
    ],
)
def test_wrong_topology_is_explained(name, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        parse_topology(name)


def test_mesh_that_leaves_devices_idle_is_refused_with_meshes_that_work():
    where = parse_topology("h200:256x1x8")
    with pytest.raises(UserError, match="2,048 devices but .* uses 1,024") as error:
        check_mesh(get(V3), where)
    suggestions = str(error.value).partition("that do: ")[2].split("; or ")
    assert "--set parallel.data=2" in suggestions[0]
    assert len(suggestions) == 3
    for suggestion in suggestions:
        sets = re.findall(r"--set (\S+)", suggestion)
        check_mesh(load_config(V3, sets), where)


def test_no_mesh_for_odd_devices():
    with pytest.raises(UserError, match="no mesh of this model uses them all"):
        check_mesh(get(V3), parse_topology("h200:7x1x7"))


def test_meshes_use_all_devices_and_split_the_experts_evenly():
    found = list(meshes(get(V3), 96))
    assert len(set(found)) == len(found) > 10
    assert all(math.prod(mesh) == 96 and 256 % mesh[2] == 0 for mesh in found)


def test_with_mesh_keeps_sequences_a_device_and_is_valid_or_none():
    v3 = get(V3)
    wider = with_mesh(v3, 8, 4, 64)
    assert wider.microbatch_sequences == 4 * 64
    assert load_config(V3, changes(v3, wider)) == wider
    alone = with_mesh(v3, 1, 1024, 1)
    assert alone.parallel.max_deferred is None and alone.parallel.buffer_factor is None
    assert with_mesh(v3, 64, 1, 64) is None  # 58 MoE layers
    assert with_mesh(v3, 16, 1, 64, sequences=1000) is None  # does not divide the batch

"""Slices of TPU generations that are not there, for tests of kernels."""

import os

import jax
import pytest
from jax.experimental import topologies


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def devices(request):
    # The first keeps libtpu from asking the network what it runs on, the second lets several
    # processes (test workers) load it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=request.param)
    except jax.errors.JaxRuntimeError as error:
        if "Invalid TPU external name" not in str(error):
            raise
        pytest.skip(f"this libtpu does not know {request.param}")
    return slice_.devices


@pytest.fixture(scope="module")
def device(devices):
    return devices[0]

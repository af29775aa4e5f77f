"""One of two processes with four devices each, run by test_hf_save.py.

python hf_process_worker.py PORT INDEX SOURCE DIRECTORY
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dsv3_jax import DeepSeekV3
from dsv3_jax.checkpoint.hf_folder import StoredTensor, open_folder


def main(port: str, index: str, source: str, directory: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    assert jax.device_count() == 8 and len(jax.local_devices()) == 4
    # The `expert` axis crosses the processes: each holds four of the eight experts.
    devices = np.array(jax.devices()).reshape(4, 2).T.reshape(1, 2, 4)
    mesh = Mesh(devices, ("pipe", "data", "expert"))
    done, read = {}, StoredTensor.read

    def counting(self, *ranges):
        part = read(self, *ranges)
        done[self.name] = done.get(self.name, 0) + part.nbytes
        return part

    StoredTensor.read = counting
    own = range(4 * int(index), 4 * int(index) + 4)
    tensors = open_folder(source).tensors
    for dtype in (jnp.float8_e4m3fn, jnp.float32):
        done.clear()
        model = DeepSeekV3.from_pretrained(source, dtype=dtype, mesh=mesh)
        for name, tensor in tensors.items():
            if ".experts." in name and tensor.dtype == "F8_E4M3":
                mine = int(name.split(".experts.")[1].split(".")[0]) in own
                assert done.get(name, 0) == mine * tensor.num_bytes, name
        model.save_pretrained(Path(directory) / jnp.dtype(dtype).name, "fp8")
    print("passed")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`tools.plan --compile`: the 671B step through both real compilers, within what a laptop has.

Each compilation takes minutes.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
FSDP = (
    "parallel.pipe=1",
    "parallel.layout=fsdp_ep",
    "parallel.dispatch=padded",
    "parallel.max_deferred=none",
)
has_tpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install 'dsv3-jax[aot]'",
)
has_gpu = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))),
    reason="needs the GPU compiler: pip install 'dsv3-jax[aot]'",
)


def plan(topology: str, *changes: str) -> tuple[int, str, str, float, int]:
    """Returns exit code, stdout, stderr, processor seconds, and the most bytes that it held."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("JAX_DEFAULT_MATMUL_PRECISION", None)  # that of the other tests
    command = [sys.executable, "-m", "tools.plan", "--config=deepseek_v3_671b", "--compile"]
    command += [f"--topology={topology}", "--format=json", *(f"--set={c}" for c in changes)]
    before = os.times()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max([peak, *(int(l.split()[1]) for l in status.splitlines() if "VmHWM" in l)])
        time.sleep(1)
    out, err = process.communicate()
    after = os.times()
    seconds = sum(after[2:4]) - sum(before[2:4])  # of children; other work may have the cores
    return process.returncode, out, err, seconds, peak * 1024


@pytest.mark.parametrize(
    "topology, changes",
    [
        pytest.param(
            "v5p:8x8x16",
            [*FSDP, "parallel.data=16", "data.microbatch_sequences=1024"],
            marks=has_tpu,
        ),
        pytest.param(  # the second phase of the extension, a sequence over 16 devices (spec §9)
            "v5p:8x8x16",
            [
                *FSDP,
                "precision=bf16",
                "parallel.context=16",
                "parallel.data=1",
                "parallel.expert=64",
                "parallel.buffer_factor=1.25",
                "data.sequence_length=131072",
                "data.sequences_per_step=64",
                "data.sequences_per_step_start=none",
                "data.microbatch_sequences=64",
            ],
            marks=has_tpu,
        ),
        pytest.param(
            "h200:256x1x8",
            [
                "parallel.data=2",
                "data.sequences_per_step_start=4096",
                "data.microbatch_sequences=128",
                "parallel.dispatch=padded",
            ],
            marks=has_gpu,
        ),
    ],
)
def test_the_671b_step_fits(topology, changes):
    code, out, err, seconds, held = plan(topology, *changes)
    assert code == 0, err
    memory = json.loads(out)["memory"]
    peak = memory["compiled"]["peak"]
    print(
        f"\n{topology}: {seconds:.0f} s, {held / 1e9:.1f} GB held, peak {peak / 1e9:.2f} GB, "
        f"estimated {memory['estimated']['total'] / 1e9:.2f} GB"
    )
    assert peak < 0.9 * memory["device"]
    assert memory["estimated"]["total"] == pytest.approx(peak, rel=0.15)
    assert seconds < 2 * 480 and held < 8e9  # 8 minutes of two cores


@has_tpu
def test_a_slice_too_small_is_refused_in_one_line():
    changes = (*FSDP, "parallel.data=4", "data.microbatch_sequences=256")
    code, out, err, _, _ = plan("v5e:16x16", *changes)
    assert code == 2 and out == ""
    last = err.strip().splitlines()[-1]  # libtpu writes lines of its own
    assert last.startswith("error: ") and "does not fit" in last

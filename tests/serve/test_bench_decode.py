"""The tool counts what a step reads, and a side that fails loses only its own rows."""

import json
import math
import os
import subprocess
import sys

from dsv3_jax.config import ModelConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.plan.parameters import count_parameters

CONTEXT = 64


def run_tool(*arguments):
    """Its exit code, lines and table."""
    command = [sys.executable, "-m", "tools.bench_decode", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = done.stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return done, found, [line for line in lines if not line.startswith("{")]


def bytes_of_step(model: ModelConfig, result: dict) -> int:
    counts, rows = count_parameters(model), result["batch"]
    unread = (model.vocab_size - rows) * model.width
    unread += sum(model.num_experts - hit for hit in result["experts_hit"]) * counts.expert
    latents = model.num_layers * CONTEXT * (model.kv_latent_dim + model.qk_rope_head_dim)
    biases = model.num_moe_layers * counts.router_bias  # in float32
    return 2 * (counts.total - unread + rows * latents + biases)


def test_ours_is_measured_where_the_peer_fails():
    # It has no second: neither with the package installed nor without can it be done in time.
    size = ("--config=tiny", "--layers=3", "--experts=8", f"--context={CONTEXT}", "--steps=4")
    done, found, table = run_tool(*size, "--batch=1,3", "--peer=eager", "--peer_seconds=1")
    ours = [result for result in found if result["system"] == "ours"]
    assert [result["batch"] for result in ours] == [1, 3]
    changes = {"num_layers": 3, "num_experts": 8, "mtp_depth": 0}
    model = ModelConfig(**(vars(tiny().model) | changes))
    for result in ours:
        assert len(result["experts_hit"]) == model.num_moe_layers == 2
        most = min(model.num_experts, result["batch"] * model.experts_per_token)
        assert all(model.experts_per_token <= hit <= most for hit in result["experts_hit"])
        assert result["bytes"] == bytes_of_step(model, result)
        rate = result["bytes"] / result["ms"] * 1e3
        assert math.isclose(result["bytes_per_second"], rate)
        assert result["copy_bytes_per_second"] > 0
    peer = [result for result in found if result["system"] != "ours"]
    assert done.returncode == 1 and len(peer) == 1 and peer[0]["error"]
    assert len(table) == 4 and "failed: " in table[-1]


def test_a_slice_that_cannot_be_is_refused():
    done, found, _ = run_tool("--experts=60")
    assert done.returncode == 2 and not found
    assert done.stderr.startswith("error: --experts=60 must be a multiple of the router's 8 groups")

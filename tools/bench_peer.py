"""The torch side of `bench_pretrain` and `bench_layer`, and what both sides share.

Runs in a process without jax: it imports nothing of the package and takes the dimensions as JSON.

    python -m tools.bench_peer SPEC.json RESULT.json
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

WARMUP_STEPS = 6
GROUP = 4  # steps between two synchronisations
NUM_BATCHES = 4  # distinct batches, used in turn
SECONDS_A_SYSTEM = 420


def time_steps(run: Callable[[int], float], num_steps: int) -> dict:
    """Times a training step.

    Args:
      run: makes that many steps back to back, waits for the device and returns the last loss.

    Returns:
      Median milliseconds a step over groups of steps, every group's, seconds of the first step
      (compilation), and the first and last loss, to show that something is learnt.
    """
    start = time.perf_counter()
    first_loss = run(1)
    first_step_seconds = time.perf_counter() - start
    run(WARMUP_STEPS - 1)
    milliseconds = []
    for _ in range(-(-num_steps // GROUP)):
        start = time.perf_counter()
        last_loss = run(GROUP)
        milliseconds.append(1e3 * (time.perf_counter() - start) / GROUP)
    return {
        "ms_a_step": statistics.median(milliseconds),
        "ms_a_step_of_groups": milliseconds,
        "first_step_seconds": first_step_seconds,
        "first_loss": first_loss,
        "last_loss": last_loss,
    }


def random_tokens(vocab_size: int, sequences: int, length: int) -> np.ndarray:
    """Int32 [NUM_BATCHES, sequences, length], the same on every call."""
    shape = (NUM_BATCHES, sequences, length)
    return np.random.default_rng(0).integers(vocab_size, size=shape, dtype=np.int32)


def run_process(arguments: list[str], result_path: Path) -> dict:
    """Runs `python -m ARGUMENTS` and reads its result; a failure becomes {'error': last line}."""
    try:
        process = subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True,
            text=True,
            timeout=SECONDS_A_SYSTEM,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result within {SECONDS_A_SYSTEM} s"}
    if process.returncode or not result_path.exists():
        sys.stderr.write(process.stderr[-4000:])
        return {"error": (process.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(result_path.read_text())


def network_config(model: dict, length: int):
    """Fields of a ModelConfig as the transformers package names them."""
    import transformers

    return transformers.DeepseekV3Config(
        vocab_size=model["vocab_size"],
        hidden_size=model["width"],
        intermediate_size=model["dense_ffn_width"],
        moe_intermediate_size=model["expert_ffn_width"],
        num_hidden_layers=model["num_layers"],
        first_k_dense_replace=model["num_dense_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_heads"],
        qk_nope_head_dim=model["qk_nope_head_dim"],
        qk_rope_head_dim=model["qk_rope_head_dim"],
        v_head_dim=model["v_head_dim"],
        q_lora_rank=model["q_latent_dim"],
        kv_lora_rank=model["kv_latent_dim"],
        n_routed_experts=model["num_experts"],
        n_shared_experts=model["num_shared_experts"],
        num_experts_per_tok=model["experts_per_token"],
        n_group=model["num_groups"],
        topk_group=model["num_groups_kept"],
        routed_scaling_factor=model["routed_scaling_factor"],
        initializer_range=model["init_std"],
        max_position_embeddings=length,
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
    )


def build_network(model: dict, length: int, device: str):
    """The bf16 model of the transformers package: SDPA attention, grouped expert matmuls."""
    import torch
    import transformers

    config = network_config(model, length)
    with torch.device(device):
        network = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    network.set_experts_implementation("grouped_mm")
    return network


def measure(spec: dict) -> dict:
    """Trains on random tokens: forward, backward, fused AdamW.

    `spec` holds `model` (fields of a ModelConfig), `sequences`, `length`, `steps`, `compiled` and
    `profile`, a trace file to write or None.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    network = build_network(spec["model"], spec["length"], "cuda" if on_gpu else "cpu").train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward = torch.compile(network) if spec["compiled"] else network
    tokens = random_tokens(spec["model"]["vocab_size"], spec["sequences"], spec["length"])
    batches = torch.tensor(tokens, dtype=torch.long, device=network.device)
    taken = 0

    def run(count: int) -> float:
        nonlocal taken
        for _ in range(count):
            batch = batches[taken % NUM_BATCHES]
            optimizer.zero_grad(set_to_none=True)
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            optimizer.step()
            taken += 1
        if on_gpu:
            torch.cuda.synchronize()
        return loss.item()

    result = time_steps(run, spec["steps"])
    if spec["profile"]:
        Path(spec["profile"]).parent.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile() as profile:
            run(3)
        profile.export_chrome_trace(spec["profile"])
    return result | {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure_layer(spec: dict) -> dict:
    """Median milliseconds of the first MoE layer, forward and backward, by the device's clock.

    `spec` holds `model`, `length`, `steps` and `compiled`.
    """
    import torch

    model = spec["model"] | {"num_layers": 1, "num_dense_layers": 0, "vocab_size": 128}
    network = build_network(model, spec["length"], "cuda").model
    layer, shape = network.layers[0].train(), (1, spec["length"], model["width"])
    x, dy = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    positions = network.rotary_emb(x, torch.arange(spec["length"], device="cuda")[None])
    forward = torch.compile(layer) if spec["compiled"] else layer
    weights = list(layer.parameters())

    def run() -> None:
        x.requires_grad_(True)
        y = forward(x, position_embeddings=positions, attention_mask=None)
        torch.autograd.grad(
            y[0] if isinstance(y, tuple) else y, [x, *weights], dy, allow_unused=True
        )

    for _ in range(3):
        run()
    times = []
    for _ in range(spec["steps"]):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return {
        "ms": statistics.median(times),
        "attention": layer.self_attn.config._attn_implementation,
    }


if __name__ == "__main__":
    spec_path, result_path = sys.argv[1:]
    spec = json.loads(Path(spec_path).read_text())
    measured = measure_layer(spec) if spec.get("layer") else measure(spec)
    Path(result_path).write_text(json.dumps(measured))

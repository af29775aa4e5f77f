"""The torch side of `bench_decode`. Runs in a process without jax.

    python -m tools.bench_decode_peer SPEC

The cache is the package's static one, full of noise; a step writes into it in place.
"""

import json
import statistics
import sys
import time

import torch
import transformers

from tools.bench_peer import build_network

WARMUP_STEPS = 6
GROUP = 4  # steps between two synchronisations


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(network, spec: dict, batch: int) -> dict:
    """Milliseconds of one token for each of `batch` rows."""
    num_steps = -(-spec["steps"] // GROUP) * GROUP
    context, vocab = spec["context"], spec["model"]["vocab_size"]
    step = (
        torch.compile(network, mode="reduce-overhead", dynamic=False)
        if spec["compiled"]
        else network
    )
    tokens = torch.randint(vocab, (batch, 1), device=network.device)
    cache = transformers.StaticCache(config=network.config, max_cache_len=context)
    network(input_ids=tokens, past_key_values=cache, use_cache=True)  # makes the cache's arrays
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        # Attention is to all places, masked or not: the last step writes the last one.
        layer.cumulative_length.fill_(context - num_steps - WARMUP_STEPS)

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            logits = step(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            logits[:, -1].argmax(-1)
        synchronize()
        return (time.perf_counter() - start) / count

    first_seconds = run(1)
    run(WARMUP_STEPS - 1)
    times = [run(GROUP) for _ in range(num_steps // GROUP)]
    return {
        "ms": 1e3 * statistics.median(times),
        "first_step_seconds": first_seconds,
        "cache_bytes": sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)),
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = build_network(spec["model"], spec["context"], device).eval()
    common = {
        "system": spec["system"],
        "context": spec["context"],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    for batch in spec["batches"]:
        try:
            with torch.no_grad():
                found = measure(network, spec, batch)
        except torch.OutOfMemoryError as error:
            found = {"error": f"out of memory: {str(error).split('. ')[1]}"}
            torch.cuda.empty_cache()
        print(json.dumps(common | {"batch": batch} | found), flush=True)


if __name__ == "__main__":
    main()

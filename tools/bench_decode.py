"""One step of decoding at V3's width: ours and the transformers package's, side by side.

    python -m tools.bench_decode [--batch=1,32,128] [--context=4096] [--experts=64]
        [--peer=eager,compiled]

The model is a slice: V3's first layers with fewer routed experts and random bfloat16 weights,
embedding and head included. A step moves every row on by one token after `context` cached ones.
Ours is the engine's own program, sampling included, on a cache of latents in scattered pages.
Each system runs in a process of its own; one that fails loses only its own rows.

Every measurement is one JSON line; a table follows. Its columns:

  GB      what a step has to read: of the experts those that tokens went to, the other weights once,
          the latents of all rows; of the embedding only the rows' tokens
  GB/s    that over the time: for the peer the same bytes, though it reads more
  of copy ours against a copy of 256 MiB in the same process, which reads and writes
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from dsv3_jax import configs
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError, run_main
from tools.text import aligned

_CONFIG = flags.DEFINE_string("config", "deepseek_v3_671b", "run whose model is cut")
_LAYERS = flags.DEFINE_integer("layers", 4, "in all", lower_bound=1)
_DENSE = flags.DEFINE_integer("dense_layers", 1, "of them with a dense FFN", lower_bound=0)
_EXPERTS = flags.DEFINE_integer("experts", 64, "routed experts a layer", lower_bound=1)
_BATCH = flags.DEFINE_list("batch", ["1", "32", "128"], "rows")
_CONTEXT = flags.DEFINE_integer("context", 4096, "tokens of a row", lower_bound=64)
_CACHE = flags.DEFINE_enum("cache_dtype", "bfloat16", ["bfloat16", "fp8"], "of ours")
_STEPS = flags.DEFINE_integer("steps", 24, "timed steps", lower_bound=4)
_PEER = flags.DEFINE_list("peer", ["eager", "compiled"], "peers: eager, compiled; none for neither")
_SECONDS = flags.DEFINE_integer("seconds", 120, "that ours may take", lower_bound=1)
_PEER_SECONDS = flags.DEFINE_integer("peer_seconds", 75, "that each peer may take", lower_bound=1)
_KERNELS = flags.DEFINE_integer("kernels", 0, "most expensive GPU kernels listed", lower_bound=0)
_SIDE = flags.DEFINE_bool("ours_here", False, "internal: measure ours in this process")

PAGE_TOKENS = 64
GROUP = 4  # steps between two synchronisations
COPY_BYTES = 2**28


def slice_of(name: str) -> ModelConfig:
    """The model of a run with the flags' layers and experts, without MTP."""
    model = configs.get(name).model
    if _DENSE.value > _LAYERS.value:
        raise UserError(f"--dense_layers={_DENSE.value} exceeds --layers={_LAYERS.value}")
    if _EXPERTS.value % model.num_groups or _EXPERTS.value < model.experts_per_token:
        raise UserError(
            f"--experts={_EXPERTS.value} must be a multiple of the router's {model.num_groups} "
            f"groups and at least the {model.experts_per_token} that a token goes to"
        )
    return dataclasses.replace(
        model,
        num_layers=_LAYERS.value,
        num_dense_layers=_DENSE.value,
        num_experts=_EXPERTS.value,
        mtp_depth=0,
    )


def random_model(config: ModelConfig):
    """Weights ~ N(0, init_std^2) in bfloat16 and gains of 1."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model.router import RouterBias
    from dsv3_jax.model.runtime import Runtime
    from dsv3_jax.model.transformer import DeepSeekV3

    runtime = Runtime(compute_dtype=jnp.dtype(jnp.bfloat16))
    model = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, params, bias = nnx.split(model, nnx.Param, RouterBias)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))

    @jax.jit(static_argnums=1)
    def normal(key, shape):
        return config.init_std * jax.random.normal(key, shape, jnp.bfloat16)

    def weight(path, leaf, key):
        if "gain" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, jnp.bfloat16)
        return normal(key, leaf.shape)

    weights = [weight(*leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), bias)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights), zeros)


def random_inputs(config: ModelConfig, num_rows: int, context: int):
    """A state whose caches are full of noise, and inputs of rows with one place left."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dsv3_jax.serve import programs
    from dsv3_jax.serve.requests import EngineOptions, Sampling
    from dsv3_jax.serve.sampling import rows_of

    pages_per_row = context // PAGE_TOKENS
    options = EngineOptions(
        max_rows=num_rows,
        context_tokens=context,
        page_tokens=PAGE_TOKENS,
        prefill_chunk=1,
        cache_dtype=_CACHE.value,
    )
    state = programs.new_state(config, options, num_rows * pages_per_row, None)

    @jax.jit(donate_argnums=0)
    def noise(bits):
        if bits.dtype == jnp.float32:  # scales of codes
            return jnp.ones_like(bits)
        values = jax.random.normal(jax.random.key(1, impl="rbg"), bits.shape, jnp.bfloat16)
        stored = values.astype(jnp.bfloat16 if bits.dtype == jnp.uint16 else jnp.float8_e4m3fn)
        return jax.lax.bitcast_convert_type(stored, bits.dtype)

    greedy = rows_of([Sampling(temperature=0.0)] * num_rows, config.vocab_size)
    state = state._replace(
        caches=jax.tree.map(noise, state.caches), rows=jax.tree.map(jnp.asarray, greedy)
    )
    rng = np.random.default_rng(0)
    pages = 1 + rng.permutation(num_rows * pages_per_row).astype(np.int32)
    inputs = programs.DecodeInputs(
        tokens_BT=rng.integers(config.vocab_size, size=(num_rows, 1), dtype=np.int32),
        position_B=np.full(num_rows, context - 1, np.int32),
        limit_B=np.full(num_rows, context, np.int32),
        pages_BZ=pages.reshape(num_rows, pages_per_row),
        logprobs_B=np.zeros(num_rows, bool),
    )
    return state, jax.device_put(inputs)


def copy_bytes_per_second() -> float:
    """Read and written, by a kernel that does nothing else."""
    import jax
    import jax.numpy as jnp

    copy = jax.jit(lambda x: x + 1)
    x = jnp.zeros(COPY_BYTES // 4, jnp.int32)
    times = []
    for _ in range(8):
        jax.block_until_ready(x)
        start = time.perf_counter()
        for _ in range(GROUP):
            y = copy(x)
        jax.block_until_ready(y)
        times.append((time.perf_counter() - start) / GROUP)
    return 2 * COPY_BYTES / statistics.median(times[1:])


def bytes_to_read(config: ModelConfig, weights, caches, hit_L, num_rows: int) -> int:
    """By one step; see the module's docstring.

    Args:
      hit_L: experts of each MoE layer that tokens went to.
    """
    import jax

    def size(tree) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    itemsize = 2
    expert = 3 * config.width * config.expert_ffn_width * itemsize
    missed = sum(config.num_experts - int(hit) for hit in hit_L)
    embedding = (config.vocab_size - num_rows) * config.width * itemsize
    trash = size(jax.tree.map(lambda x: x[:, :1], caches))  # the page of nobody
    return size(weights) - missed * expert - embedding + size(caches) - trash


def measure_ours(config: ModelConfig, num_rows: int, context: int, model) -> Iterator[dict]:
    """Times the engine's decode program: of a step, then of its kernels if a flag asks for them."""
    import jax
    import numpy as np

    from dsv3_jax.serve import programs

    graphdef, weights = programs.split_model(model)
    state, inputs = random_inputs(config, num_rows, context)
    start = time.perf_counter()
    decode = programs.decode.lower(
        weights, state, inputs, graphdef=graphdef, mesh=None, num_drafts=0
    ).compile()
    compile_seconds = time.perf_counter() - start

    def step():
        nonlocal state
        outputs, state = decode(weights, state, inputs)
        return outputs

    step()
    before = np.asarray(state.load_SLE)
    assert np.asarray(step().finite_B).all(), "the logits are not numbers"
    hit_L = ((np.asarray(state.load_SLE) - before)[0] > 0).sum(-1)
    read = bytes_to_read(config, weights, state.caches, hit_L, num_rows)
    times = []
    for _ in range(-(-_STEPS.value // GROUP)):
        start = time.perf_counter()
        for _ in range(GROUP):
            outputs = step()
        jax.block_until_ready(outputs)
        times.append((time.perf_counter() - start) / GROUP)
    seconds = statistics.median(times)
    yield {
        "ms": 1e3 * seconds,
        "bytes": read,
        "bytes_per_second": read / seconds,
        "experts_hit": [int(hit) for hit in hit_L],
        "temporary_gib": decode.memory_analysis().temp_size_in_bytes / 2**30,
        "compile_seconds": compile_seconds,
    }
    if _KERNELS.value:
        from pallas_kernels.timing import kernel_times

        times = kernel_times(step, [()], 10)
        kernels = sorted(times.items(), key=lambda item: -item[1])[: _KERNELS.value]
        yield {
            "all_kernels_us": round(sum(times.values()), 1),
            "kernels_us": {name[:80]: round(time, 1) for name, time in kernels},
        }


def ours_here(config: ModelConfig) -> None:
    """One JSON line a batch. A batch that fails says so, and the next is tried."""
    import jax

    from dsv3_jax.serve import programs

    model = programs.layers_apart(random_model(config))  # as an engine has it on a GPU
    common = {
        "system": "ours",
        "context": _CONTEXT.value,
        "device": jax.devices()[0].device_kind,
        "copy_bytes_per_second": copy_bytes_per_second(),
    }
    for num_rows in map(int, _BATCH.value):
        of_batch = common | {"batch": num_rows}
        try:
            for found in measure_ours(config, num_rows, _CONTEXT.value, model):
                print(json.dumps(of_batch | found), flush=True)
        except RuntimeError as error:  # of memory, of counters
            print(json.dumps(of_batch | {"error": str(error).splitlines()[0]}), flush=True)


def lines_of(system: str, arguments: list[str], seconds: int) -> list[dict]:
    """Runs `python -m ARGUMENTS`, prints its JSON lines as they come and returns them.

    A process that ends badly or late adds a line with the reason.
    """
    results: list[dict] = []
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        late = threading.Timer(seconds, process.kill)
        late.start()
        for line in process.stdout:
            if line.startswith("{"):
                results.append(json.loads(line))
                print(line, end="", flush=True)
        if process.wait():
            errors.seek(0)
            said = errors.read().strip()
            sys.stderr.write(said[-3000:] + "\n")
            reason = (said.splitlines() or ["no message"])[-1]
            if not late.is_alive():
                reason = f"no more results within {seconds} s"
            results.append({"system": system, "error": reason})
            print(json.dumps(results[-1]), flush=True)
        late.cancel()
    return results


def table(results: list[dict]) -> str:
    """Rows of `results` by batch, ours first."""
    ours = {r["batch"]: r for r in results if r["system"] == "ours" and "ms" in r}
    rows = [("system", "batch", "ms", "tokens/s", "GB", "GB/s", "of copy", "ours/it")]
    for result in sorted(results, key=lambda r: r.get("batch", sys.maxsize)):
        name, batch = result["system"], result.get("batch")
        if "error" in result:
            rows.append((name, str(batch or ""), f"failed: {result['error'][:60]}", *[""] * 5))
            continue
        if "ms" not in result:
            continue
        seconds, own = result["ms"] / 1e3, ours.get(batch)
        cells = [name, str(batch), f"{result['ms']:.2f}", f"{batch / seconds:,.0f}"]
        if own:
            rate = own["bytes"] / seconds
            cells += [f"{own['bytes'] / 1e9:.2f}", f"{rate / 1e9:,.0f}"]
            cells += [f"{rate / own['copy_bytes_per_second']:.0%}"]
            cells += [f"{result['ms'] / own['ms']:.2f}" if name != "ours" else ""]
        rows.append((*cells, *[""] * (8 - len(cells))))
    return "\n".join(aligned(rows, 1))


def main(argv: list[str]) -> int | None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    config, peers = slice_of(_CONFIG.value), [peer for peer in _PEER.value if peer != "none"]
    if unknown := set(peers) - {"eager", "compiled"}:
        raise UserError(f"--peer={','.join(unknown)} is unknown; allowed: eager, compiled, none")
    if _CONTEXT.value % PAGE_TOKENS:
        raise UserError(f"--context={_CONTEXT.value} must be a multiple of {PAGE_TOKENS}")
    if not all(batch.isdecimal() and int(batch) for batch in _BATCH.value):
        raise UserError(f"--batch={','.join(_BATCH.value)} must be positive numbers, e.g. 1,32")
    if _SIDE.value:
        ours_here(config)
        return None
    results = lines_of("ours", ["tools.bench_decode", *sys.argv[1:], "--ours_here"], _SECONDS.value)
    for peer in peers:
        spec: dict[str, Any] = {
            "system": f"transformers, {peer}",
            "model": dataclasses.asdict(config),
            "batches": list(map(int, _BATCH.value)),
            "context": _CONTEXT.value,
            "steps": _STEPS.value,
            "compiled": peer == "compiled",
        }
        arguments = ["tools.bench_decode_peer", json.dumps(spec)]
        results += lines_of(spec["system"], arguments, _PEER_SECONDS.value)
    print(table(results))
    return 1 if any("error" in result for result in results) else None


if __name__ == "__main__":
    run_main(main)

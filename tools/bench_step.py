"""Speed of a configuration's training step, and what the device does in that time.

    python -m tools.bench_step [--config=small] [--set KEY=VALUE]... [--scaling] [--kernels=12]

Runs the step of the training loop on random tokens, without waiting between steps, as the loop
does; traces a few and sums the kernels of the first device by what they are for. `idle` is time in
which no kernel runs. `--scaling` repeats it with fewer and more layers and tokens.
"""

import dataclasses
import re
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from absl import flags

from dsv3_jax.config import Config
from dsv3_jax.errors import UserError, run_main
from tools.text import aligned

_CONFIG = flags.DEFINE_string("config", "small", "Name of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE.")
_STEPS = flags.DEFINE_integer("steps", 12, "Timed, in groups of 4.", lower_bound=4)
_SCALING = flags.DEFINE_bool("scaling", False, "Other numbers of layers and tokens too.")
_KERNELS = flags.DEFINE_integer("kernels", 12, "Most expensive kernels listed.", lower_bound=0)
_PEAK = flags.DEFINE_float("peak_tflops", 989.0, "bf16 peak of a device: the MFU's denominator.")
_PROFILE = flags.DEFINE_string("profile", None, "Reads this folder of a trace, and runs nothing.")

TRACED_STEPS = 3
KINDS = {  # of kernels, by the first pattern that their name matches
    "collectives": r"nccl|AllToAll",
    "attention": r"mla_|cudnn|flash|fmha|sdpa",
    "FP8 products": r"fp8_product|e4m3",
    "quantisation": r"quantize|retile",
    "grouped products": r"body_mosaic|grouped|ragged",
    "matrix products": r"nvjet|gemm|cutlass|cublas|dot",
    "sorting": r"sort|radix|topk",
    "copies": r"Memcpy|Memset|copy",
    "elementwise, reductions": r"",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, kernel))


def timed(config: Config, folder: Path | None) -> dict:
    """Seconds a step, the compiled step's memory, and with `folder` a trace of a few steps."""
    import jax
    import numpy as np

    from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
    from dsv3_jax.train.state import init_state
    from dsv3_jax.train.step import make_train_step

    mesh, rows = make_mesh(config.parallel), config.microbatch_sequences
    graphdef, state, shardings = init_state(config, mesh)
    shape = (config.data.sequences_per_step // rows, rows, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    batch = jax.device_put({"tokens": tokens.astype(np.int32)}, batch_sharding(mesh, leading=1))
    scalars = np.float32(1e-4), np.float32(1e-3), np.float32(0.3)
    step = make_train_step(config, graphdef, shardings)

    def run(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch, *scalars)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - started) / count

    run(1), run(3)
    seconds = statistics.median(run(4) for _ in range(_STEPS.value // 4))
    if folder is not None:
        with jax.profiler.trace(str(folder)):
            run(TRACED_STEPS)
    memory = jax.local_devices()[0].memory_stats() or {}
    return {"seconds": seconds, "peak_gib": memory.get("peak_bytes_in_use", 0) / 2**30}


def rates(config: Config, seconds: float) -> tuple[float, float]:
    """Tokens a second of all devices, and MFU: FLOPs of the causal model over the bf16 peak."""
    import jax

    from dsv3_jax.plan.flops import flops_per_token

    tokens = config.tokens_per_step / seconds
    flops = flops_per_token(config.model, config.data.sequence_length)
    return tokens, flops * tokens / (_PEAK.value * 1e12 * jax.device_count())


def profile_report(folder: Path, num_steps: int) -> list[str]:
    """Lines about what the first device of a trace did: by kind, and its longest kernels."""
    from dsv3_jax.plan.overlap_profile import busy_ns, device_events

    events = device_events(folder)[0]
    window = max(e.end for e in events) - min(e.start for e in events)
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        kinds[kind_of(event.kernel)] += event.end - event.start
        kernels[event.kernel].append(event.end - event.start)

    def row(name: str, ns: float, count: str) -> tuple[str, ...]:
        return name, f"{ns / 1e6 / num_steps:.2f}", f"{ns / window:.1%}", count

    rows = [("of a step", "ms", "share", "kernels")]
    for kind in KINDS:
        count = sum(len(times) for name, times in kernels.items() if kind_of(name) == kind)
        rows.append(row(kind, kinds[kind], f"{count / num_steps:.0f}"))
    rows.append(row("idle", window - busy_ns(events), ""))
    longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[: _KERNELS.value]
    rows += [row(name[:70], sum(t), f"{len(t) / num_steps:.0f}") for name, t in longest]
    return aligned(rows, num_left=1)


def scaled(config: Config) -> dict[str, Config]:
    """The configuration with half and 1.5 times its layers, half and twice its sequences."""
    model, data, replace = config.model, config.data, dataclasses.replace

    def layers(number: int) -> Config:
        return replace(config, model=replace(model, num_layers=number))

    def sequences(number: int) -> Config:
        return replace(config, data=replace(data, sequences_per_step=number))

    variants = [layers(model.num_layers // 2), config, layers(model.num_layers * 3 // 2)]
    variants += [sequences(data.sequences_per_step // 2), sequences(data.sequences_per_step * 2)]
    return {f"{c.model.num_layers} layers, {c.tokens_per_step} tokens": c for c in variants}


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    if _PROFILE.value:
        print("\n".join(profile_report(Path(_PROFILE.value), TRACED_STEPS)))
        return
    from dsv3_jax.overrides import load_config
    from dsv3_jax.parallel.mesh import emulate_cpu_devices

    config = load_config(_CONFIG.value, _SET.value)
    emulate_cpu_devices(config.parallel)
    import jax

    print(f"{jax.device_count()} {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    variants = scaled(config) if _SCALING.value else {config.run.name: config}
    for name, variant in variants.items():
        on_gpu = jax.default_backend() != "cpu" and variant is config
        with tempfile.TemporaryDirectory() as folder:
            found = timed(variant, Path(folder) if on_gpu else None)
            tokens, mfu = rates(variant, found["seconds"])
            print(
                f"{name}: {1e3 * found['seconds']:.2f} ms a step, {tokens:,.0f} tokens/s, "
                f"MFU {mfu:.1%}, {found['peak_gib']:.1f} GiB at most so far",
                flush=True,
            )
            if on_gpu:
                print("\n".join(profile_report(Path(folder), TRACED_STEPS)), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    run_main(main)

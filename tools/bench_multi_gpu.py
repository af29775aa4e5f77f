"""Checks and times what needs several GPUs of one host: dispatch, pipelines, layouts.

    python -m tools.bench_multi_gpu [--sections=dispatch,equality,schedules,layouts] [--profile=DIR]

Takes all devices. Every measurement is one JSON line as soon as it is known; a case that fails says
so in its line and the next is tried; exit code 1 if one did.

  dispatch   send and combine of each back end at V3's width, beside a bare all-to-all of the same
             buffers. GB/s count the rows that have to leave the device, once for each destination
  equality   loss and every gradient leaf of each schedule and back end against one device, float32
  schedules  step time of a slice of V3-wide layers on pipeline ranks, beside `1f1b`; with
             --profile also how much of the transfers' time was hidden under compute
  layouts    step time of that slice without a pipeline: `zero1_ep`, `fsdp_ep`
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax import configs
from dsv3_jax.config import Config
from dsv3_jax.errors import UserError, run_main

_SECTIONS = flags.DEFINE_list(
    "sections", ["dispatch", "equality", "schedules", "layouts"], "what is measured, in this order"
)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "of a device, or of a micro-batch", lower_bound=8)
_WIDTH = flags.DEFINE_integer("width", 7168, "of dispatched rows", lower_bound=8)
_EXPERTS = flags.DEFINE_integer("experts", 8, "a layer of the slice; 4 a token", lower_bound=4)
_MICROBATCHES = flags.DEFINE_integer("microbatches", 8, "of a step of the slice", lower_bound=4)
_REMAT = flags.DEFINE_enum("remat", "full", ["none", "paper", "full"], "what a slice recomputes")
_STEPS = flags.DEFINE_integer("steps", 4, "timed", lower_bound=1)
_SLICE = flags.DEFINE_string("slice", "deepseek_v3_671b", "run whose layers the slice has")
_PIPES = flags.DEFINE_list("pipes", ["2"], "pipeline ranks of 'equality' and 'schedules'")
_SCHEDULES = flags.DEFINE_list(
    "schedules", ["1f1b", "dualpipe", "dualpipev", "zb1p"], "of 'equality' and 'schedules'"
)
_PROFILE = flags.DEFINE_string("profile", None, "folder for one traced step of each schedule")

DEEPEP = {"dispatch": 153.0, "combine": 158.0}  # GB/s in a node of H800, EP 8 (spec §7)
TOP_K = 8


def backends() -> dict[str, dict[str, Any]]:
    """Options of dispatch; `hierarchical` takes the devices for two nodes."""
    import jax

    return {
        "padded": {"dispatch": "padded"},
        "capped": {"dispatch": "padded", "buffer_factor": 2.0},
        "ragged": {"dispatch": "ragged"},
        "hierarchical": {"dispatch": "hierarchical", "devices_per_node": jax.device_count() // 2},
    }


def seconds_of(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` groups of 4 calls that follow each other, after two that do not count."""
    import jax

    jax.block_until_ready([call(), call()])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready([call() for _ in range(4)])
        times.append((time.perf_counter() - start) / 4)
    return statistics.median(times)


def dispatch() -> Iterator[dict]:
    """Back ends over all devices: bfloat16 rows, then FP8 codes with their scales, then combine."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from dsv3_jax.config import ParallelConfig
    from dsv3_jax.model.runtime import Runtime
    from dsv3_jax.parallel import expert_parallel
    from dsv3_jax.parallel.mesh import BATCH_AXES, make_mesh

    size, X, D = jax.device_count(), _TOKENS.value, _WIDTH.value
    num_experts = 32 * size
    mesh = make_mesh(ParallelConfig(expert=size))
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    rng = np.random.default_rng()
    ids_XK = np.argsort(rng.random((size * X, num_experts)), axis=-1)[:, :TOP_K].astype(np.int32)
    weights_XK = rng.uniform(0.1, 1, ids_XK.shape).astype(np.float32)
    x_XD = rng.normal(size=(size * X, D)).astype(jnp.bfloat16)
    ids_XK, weights_XK, x_XD = (jax.device_put(a, rows) for a in (ids_XK, weights_XK, x_XD))
    owners = np.asarray(ids_XK) // 32
    reached = np.stack([(owners == place).any(-1) for place in range(size)], -1)
    own = np.repeat(np.arange(size), X)
    away = (reached.sum() - reached[np.arange(size * X), own].sum()) / size  # rows of one device

    def sharded(function, num_in, num_out):
        specs = PartitionSpec(BATCH_AXES)
        return jax.jit(
            jax.shard_map(
                function,
                mesh=mesh,
                in_specs=(specs,) * num_in,
                out_specs=(specs,) * num_out if num_out > 1 else specs,
                check_vma=False,
            )
        )

    def bare(x_XD):
        buffer_SXD = jnp.broadcast_to(x_XD[None], (size, *x_XD.shape))
        return jax.lax.all_to_all(buffer_SXD, "expert", 0, 0).reshape(-1, D)

    bare = sharded(bare, 1, 1)
    seconds = seconds_of(lambda: bare(x_XD), _STEPS.value)
    ceiling = (size - 1) * X * D * 2 / seconds
    yield {"case": "all_to_all", "ms": 1e3 * seconds, "gbps": ceiling / 1e9}

    for name, options in backends().items():

        def measure(options=options):
            runtime = Runtime(mesh=mesh, **options)
            hops = expert_parallel.make_hops(runtime, X, TOP_K)

            def route(ids_XK, weights_XK):
                return expert_parallel.route(ids_XK, weights_XK, num_experts=num_experts, hops=hops)

            def send(x_XD, ids_XK, weights_XK):
                choices = route(ids_XK, weights_XK)
                return expert_parallel.send(x_XD, choices.plans, hops=hops)

            def there_and_back(x_XD, ids_XK, weights_XK):
                choices = route(ids_XK, weights_XK)
                rows_RD = expert_parallel.send(x_XD, choices.plans, hops=hops)
                return expert_parallel.combine(rows_RD, choices.plans, hops=hops)

            def send_fp8(x_XD, ids_XK, weights_XK):
                choices = route(ids_XK, weights_XK)
                codes_XD = x_XD.astype(jnp.float8_e4m3fn)  # with a scale for 128 numbers
                scales_XT = x_XD[:, :: min(128, D)].astype(jnp.float32)
                return tuple(
                    expert_parallel.send(a, choices.plans, hops=hops) for a in (codes_XD, scales_XT)
                )

            plan = sharded(lambda *a: route(*a).weights_RK, 2, 1)
            send, back = sharded(send, 3, 1), sharded(there_and_back, 3, 1)
            send_fp8 = sharded(send_fp8, 3, 2)
            operands = x_XD, ids_XK, weights_XK
            found = np.asarray(back(*operands), np.float32)
            want = np.asarray(x_XD, np.float32) * reached.sum(-1, keepdims=True)
            error = np.linalg.norm(found - want) / np.linalg.norm(want)
            routing = seconds_of(lambda: plan(ids_XK, weights_XK), _STEPS.value)
            there = seconds_of(lambda: send(*operands), _STEPS.value) - routing
            both = seconds_of(lambda: back(*operands), _STEPS.value) - routing
            fp8 = seconds_of(lambda: send_fp8(*operands), _STEPS.value) - routing
            rate = {"dispatch": away * D * 2 / there, "combine": away * D * 2 / (both - there)}
            return {
                "routing_ms": 1e3 * routing,
                "dispatch_ms": 1e3 * there,
                "combine_ms": 1e3 * (both - there),
                "dispatch_fp8_ms": 1e3 * fp8,
                "bf16_over_fp8": there / fp8,
                **{f"{k}_gbps": v / 1e9 for k, v in rate.items()},
                **{f"{k}_of_deepep": v / 1e9 / DEEPEP[k] for k, v in rate.items()},
                **{f"{k}_of_all_to_all": v / ceiling for k, v in rate.items()},
                "relative_error": float(error),
            }

        yield attempt(name, measure)


def with_fields(config: Config, section: str, **fields: Any) -> Config:
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **fields)}
    )


def small_config(**parallel: Any) -> Config:
    """`tiny` with random weights of a size that gradients feel, in float32."""
    config = configs.get("tiny")
    layers = 1 + 2 * max(map(int, _PIPES.value))  # a MoE layer for every stage of `dualpipev`
    model = dataclasses.replace(
        config.model, vocab_size=256, width=64, num_layers=layers, num_dense_layers=1, init_std=0.1
    )
    config = dataclasses.replace(config, model=model)
    fields = {"data": 1, "expert": 1, "pipe": 1} | parallel
    config = with_fields(config, "parallel", **fields)
    return with_fields(config, "precision", compute="float32", moments="float32", remat="none")


def one_step(config: Config, batch, start=None):
    """Loss, and first moments after one step: the clipped gradients, times 1 - beta1."""
    import jax

    from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
    from dsv3_jax.train.state import abstract_state, init_state
    from dsv3_jax.train.step import make_train_step

    mesh = make_mesh(config.parallel)
    graphdef, template = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    if start is None:
        start = jax.device_get(init_state(config, mesh)[1])
    step = make_train_step(config, graphdef, shardings)
    batch = jax.device_put(batch, batch_sharding(mesh, leading=1))
    state = jax.device_put(start, shardings)
    state, metrics = step(state, batch, 1e-3, 1e-3, 0.3)
    return start, *jax.device_get((metrics["loss"], state.opt_state.mean))


def equality() -> Iterator[dict]:
    """Relative errors of the loss and of the worst gradient leaf against one device."""
    import jax
    import numpy as np

    jax.config.update("jax_default_matmul_precision", "highest")
    size = jax.device_count()
    tokens = np.random.default_rng(0).integers(0, 256, (8, size, 65)).astype(np.int32)
    batch = {"tokens": tokens}
    start, want_loss, want = one_step(small_config(), batch)

    def compare(**parallel):
        _, loss, found = one_step(small_config(**parallel), batch, start)
        errors = {
            jax.tree_util.keystr(path): float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for (path, b), a in zip(
                jax.tree_util.tree_leaves_with_path(want), jax.tree.leaves(found), strict=True
            )
        }
        worst = max(errors, key=errors.get)
        loss_error = float(abs(loss - want_loss) / abs(want_loss))
        holds = loss_error <= 1e-5 and errors[worst] <= 1e-5
        return {"loss": loss_error, "gradient": errors[worst], "leaf": worst, "holds": holds}

    for name, options in backends().items():
        room = {"buffer_factor": 8.0} if "buffer_factor" in options else {}
        yield attempt(name, lambda o=options | room: compare(expert=size, **o))
    for pipe in map(int, _PIPES.value):
        for name in _SCHEDULES.value:
            options = dict(pipe=pipe, expert=size // pipe, schedule=name)
            yield attempt(f"{name}, {pipe} ranks", lambda o=options: compare(**o))


def slice_config(**parallel: Any) -> Config:
    """Four MoE layers of a run's width and few experts; a micro-batch is a sequence a device."""
    config = configs.get(_SLICE.value)
    model = dataclasses.replace(
        config.model,
        vocab_size=min(4096, config.model.vocab_size),
        num_layers=4,
        num_dense_layers=0,
        mtp_depth=0,
        num_experts=_EXPERTS.value,
        experts_per_token=4,
        num_groups=1,
        num_groups_kept=1,
    )
    config = dataclasses.replace(config, model=model)
    fields = {"data": 1, "expert": 1, "pipe": 1, "dispatch": "padded", "max_deferred": None}
    config = with_fields(config, "parallel", **(fields | {"buffer_factor": 2.0} | parallel))
    return with_fields(config, "precision", compute="bfloat16", remat=_REMAT.value)


def step_seconds(config: Config, profile: str | None = None) -> dict:
    """Compiles the training step and times it on random tokens; with `profile` traces one more."""
    import jax
    import numpy as np

    from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
    from dsv3_jax.plan.overlap_profile import read_profile
    from dsv3_jax.train.state import init_state
    from dsv3_jax.train.step import make_train_step

    mesh, parallel = make_mesh(config.parallel), config.parallel
    graphdef, state, shardings = init_state(config, mesh)
    shape = (_MICROBATCHES.value, parallel.data * parallel.expert, _TOKENS.value + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    batch = jax.device_put({"tokens": tokens}, batch_sharding(mesh, leading=1))
    start = time.perf_counter()
    step = make_train_step(config, graphdef, shardings)
    step = step.lower(state, batch, 1e-4, 1e-3, 0.3).compile()
    compiled = time.perf_counter() - start

    def run():
        nonlocal state
        state, metrics = step(state, batch, 1e-4, 1e-3, 0.3)
        return metrics["loss"]

    losses = [float(run()) for _ in range(2)]
    times = []
    for _ in range(_STEPS.value):
        start = time.perf_counter()
        losses.append(float(run()))
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times)
    found = {
        "seconds": seconds,
        "tokens_per_second_per_device": shape[0] * shape[1] * _TOKENS.value / seconds / mesh.size,
        "losses": [losses[0], losses[-1]],
        "compile_seconds": compiled,
        "peak_gib": memory_gib(step),
    }
    if profile:
        with jax.profiler.trace(profile):
            run().block_until_ready()
        times = read_profile(Path(profile))
        total = sum(t.total_ns for t in times)
        found |= {
            "transfers_ms_per_device": total / 1e6 / mesh.size,
            "hidden": sum(t.hidden_ns for t in times) / total if total else None,
        }
    return found


def memory_gib(step) -> float:
    """What the compiler plans for a device: arguments and temporaries, aliases once."""
    analysis = step.memory_analysis()
    held = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    return held / 2**30


def schedules() -> Iterator[dict]:
    """The other devices are in `expert`; idle ticks by the simulator stand beside."""
    import jax

    from dsv3_jax.parallel.pipeline.schedules import make_schedule
    from dsv3_jax.parallel.pipeline.simulate import simulate

    for pipe in map(int, _PIPES.value):
        first = None
        for name in _SCHEDULES.value:
            profile = f"{_PROFILE.value}/{name}{pipe}" if _PROFILE.value else None
            config = slice_config(pipe=pipe, expert=jax.device_count() // pipe, schedule=name)
            found = attempt(f"{name}, {pipe} ranks", partial(step_seconds, config, profile))
            if "seconds" in found:
                first = first or found
                found["over"] = first["case"]
                found["speedup"] = first["seconds"] / found["seconds"]
                simulation = simulate(make_schedule(name, pipe, _MICROBATCHES.value))
                found["simulated_units"] = simulation.makespan
            yield found


def layouts() -> Iterator[dict]:
    """All devices in `expert`: where the optimizer's and the other weights' shards lie."""
    import jax

    for name in ("zero1_ep", "fsdp_ep"):
        config = slice_config(expert=jax.device_count(), layout=name)
        profile = f"{_PROFILE.value}/{name}" if _PROFILE.value else None
        yield attempt(name, lambda c=config, p=profile: step_seconds(c, p))


def attempt(name: str, measure: Callable[[], dict]) -> dict:
    """`measure()` under a name, or the first line of what it raised."""
    try:
        return {"case": name} | measure()
    except Exception as error:  # of memory, of the compiler: the other cases still count
        return {
            "case": name,
            "error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}",
        }


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    sections = {f.__name__: f for f in (dispatch, equality, schedules, layouts)}
    if unknown := set(_SECTIONS.value) - set(sections):
        raise UserError(
            f"--sections={','.join(sorted(unknown))} is unknown; allowed: {', '.join(sections)}"
        )
    import jax

    devices = jax.devices()
    if len(devices) < 2 or len(devices) % 2:
        raise UserError(
            f"{len(devices)} {devices[0].platform} device(s) exist, and an even number is needed; "
            "on CPU set XLA_FLAGS=--xla_force_host_platform_device_count=2"
        )
    print(json.dumps({"devices": len(devices), "kind": devices[0].device_kind}), flush=True)
    failed = False
    for name in _SECTIONS.value:
        start = time.perf_counter()
        for found in sections[name]():
            failed |= "error" in found or found.get("holds") is False
            print(json.dumps({"section": name} | found), flush=True)
            jax.clear_caches()
        print(json.dumps({"section": name, "total_seconds": time.perf_counter() - start}))
    return int(failed)


if __name__ == "__main__":
    run_main(main)

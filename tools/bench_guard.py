"""What the guards cost: the training step with and without them, taking turns in one process.

    python -m tools.bench_guard [--config=tiny] [--set KEY=VALUE]... [--rounds=20] [--steps=10]

Without them an update is never undone (train/step.py:kept_unless) and losses are not looked at.
Prints the median seconds a step of both, and the median of the ratios of neighbouring rounds.
"""

import time

import numpy as np
from absl import flags

from dsv3_jax.errors import UserError, run_main

_CONFIG = flags.DEFINE_string("config", "tiny", "Name of the configuration.")
_SET = flags.DEFINE_multi_string("set", [], "Override: KEY=VALUE.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Turns of each.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 10, "Steps of a turn.", lower_bound=1)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; overrides are written --set KEY=VALUE")
    from dsv3_jax.overrides import load_config
    from dsv3_jax.parallel.mesh import emulate_cpu_devices

    config = load_config(_CONFIG.value, _SET.value)
    emulate_cpu_devices(config.parallel)
    import jax

    from dsv3_jax.parallel.mesh import batch_sharding, make_mesh
    from dsv3_jax.train import step as step_module
    from dsv3_jax.train.state import init_state

    mesh, rows = make_mesh(config.parallel), config.microbatch_sequences
    shape = (config.data.sequences_per_step // rows, rows, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
    batch = jax.device_put({"tokens": tokens.astype(np.int32)}, batch_sharding(mesh, leading=1))
    scalars = np.float32(1e-4), np.float32(1e-3), np.float32(0.3)
    guarded = step_module.kept_unless
    runs = {}
    for name, keep in (("guarded", guarded), ("unguarded", lambda accepted, new, old: new)):
        step_module.kept_unless = keep  # seen when the step is traced, in its first call
        graphdef, state, shardings = init_state(config, mesh)
        step = step_module.make_train_step(config, graphdef, shardings)
        runs[name] = step, jax.block_until_ready(step(state, batch, *scalars))[0]
    seconds = {name: [] for name in runs}
    for turn in range(_ROUNDS.value):
        for name in sorted(runs, reverse=bool(turn % 2)):
            step, state = runs[name]
            started = time.perf_counter()
            for _ in range(_STEPS.value):
                state, metrics = step(state, batch, *scalars)
            jax.block_until_ready((state, metrics))
            seconds[name].append((time.perf_counter() - started) / _STEPS.value)
            runs[name] = step, state
    for name, values in seconds.items():
        print(f"{name:<10} {np.median(values):.5f} s a step, {len(values)} turns")
    ratios = np.array(seconds["guarded"]) / np.array(seconds["unguarded"])
    spread = np.quantile(ratios, [0.25, 0.75])
    print(f"ratio      {np.median(ratios):.4f} ({spread[0]:.4f} to {spread[1]:.4f})")


if __name__ == "__main__":
    run_main(main)

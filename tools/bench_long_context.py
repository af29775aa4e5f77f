"""MLA at V3's width over a long sequence on one GPU: time, memory, and whether it is right.

    python -m tools.bench_long_context [--tokens=131072] [--backward]

The layer's forward pass in bfloat16 with YaRN (spec §2); `--backward` takes the gradients of its
input and weights too. Checks outputs of the last tokens, which see all others, against a float32
computation of those rows alone. Exit code 1: an error above 2e-2.
"""

import dataclasses

from absl import flags

from dsv3_jax import configs
from dsv3_jax.config import YarnConfig
from dsv3_jax.errors import UserError, run_main

_TOKENS = flags.DEFINE_integer("tokens", 131072, "of the sequence", lower_bound=256)
_BACKWARD = flags.DEFINE_bool("backward", False, "gradients too")

CHECKED_TOKENS = 64
MAX_ERROR = 2e-2  # relative, of bfloat16 results


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model import rope
    from dsv3_jax.model.mla import MLA
    from dsv3_jax.model.runtime import Runtime

    if jax.default_backend() != "gpu":
        raise UserError("bench_long_context times kernels of an NVIDIA GPU; there is none here")
    from pallas_kernels.timing import kernel_times

    model, T = configs.get("deepseek_v3_671b").model, _TOKENS.value
    model = dataclasses.replace(model, yarn=YarnConfig(enabled=True))
    low, high = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)

    def layer(dtype):
        return MLA(model, runtime=Runtime(compute_dtype=dtype), rngs=nnx.Rngs(0))

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: layer(low)))
    weights = jax.jit(lambda: nnx.to_pure_dict(nnx.split(layer(low))[1]))()
    weights = jax.tree.map(lambda w: w.astype(low) if w.ndim == 2 else w, weights)
    x_BTD = jax.random.normal(jax.random.key(1), (1, T, model.width), low)
    cos_sin = rope.cos_sin(rope.positions(T, None), model)

    def forward(weights, x_BTD):
        return nnx.merge(graphdef, weights)(x_BTD, cos_sin=cos_sin)

    def both(weights, x_BTD):
        y_BTD, pull = jax.vjp(forward, weights, x_BTD)
        return y_BTD, pull(y_BTD)

    function = jax.jit(both if _BACKWARD.value else forward)
    compiled = function.lower(weights, x_BTD).compile()
    times = kernel_times(compiled, [(weights, x_BTD)], 3)
    y_BTD = jax.tree.leaves(compiled(weights, x_BTD))[0]
    memory, seconds = compiled.memory_analysis(), sum(times.values()) / 1e6
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    scores = 2 * model.num_heads * T * T
    print(f"{jax.devices()[0].device_kind}: {T} tokens, {model.num_heads} heads")
    print(
        f"{'forward and backward' if _BACKWARD.value else 'forward'}: {1e3 * seconds:.0f} ms, "
        f"{held / 2**30:.1f} GiB with weights, input and output; the scores alone in bfloat16 "
        f"would be {scores / 2**40:.1f} TiB"
    )
    width = model.qk_head_dim + model.v_head_dim
    width += (3 * model.qk_head_dim + 2 * model.v_head_dim) * _BACKWARD.value
    attention = sum(time for name, time in times.items() if "mla_" in name) / 1e6
    if attention:
        rate = model.num_heads * T * T * width / attention / 1e12
        print(f"attention kernels: {1e3 * attention:.0f} ms, {rate:.0f} useful TFLOP/s")

    @jax.jit
    def last_rows(weights, x_BTD):
        """The layer's outputs of the last tokens, from latents, in float32, a head at a time."""
        mla = nnx.merge(nnx.split(nnx.eval_shape(lambda: layer(high)))[0], weights)
        latents = mla.latents(x_BTD.astype(high), cos_sin)
        tail = jax.tree.map(lambda a: a[..., -CHECKED_TOKENS:, :], cos_sin)
        visible_TS = jnp.arange(T) <= jnp.arange(T - CHECKED_TOKENS, T)[:, None]
        return mla.absorbed(x_BTD[:, -CHECKED_TOKENS:].astype(high), latents, tail, visible_TS)

    wide = jax.tree.map(lambda w: w.astype(high), weights)
    with jax.default_matmul_precision("highest"):
        wanted = last_rows(wide, x_BTD)
    found = y_BTD[:, -CHECKED_TOKENS:].astype(high)
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    print(f"error of the last {CHECKED_TOKENS} outputs against float32: {error:.1e}")
    return int(not error <= MAX_ERROR)


if __name__ == "__main__":
    run_main(main)

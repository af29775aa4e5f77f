"""Speed of MLA's attention on a Hopper GPU beside cuDNN's padded path, in one run.

    python -m pallas_kernels.bench_attention [--tokens=4096] [--heads=128] [--tilings]

Times are those of `timing`. Rates count the causal half of T x T for every product: forward two
(scores, values), backward five (scores once more); those of a single kernel all that it computes.
"""

import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv3_jax.model import attention_cudnn
from pallas_kernels import regression
from pallas_kernels.mla_attention import (
    gpu_backward,
    gpu_backward_keys,
    gpu_forward,
    mla_attention,
)
from pallas_kernels.mla_attention.reference import mla_attention_reference
from pallas_kernels.timing import microseconds

_TOKENS = flags.DEFINE_integer("tokens", 4096, "of the sequence")
_HEADS = flags.DEFINE_integer("heads", 128, "of queries")
_TILINGS = flags.DEFINE_bool("tilings", False, "time every tiling, not the default one")

NOPE, ROPE, VALUE = 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
MAX_ERROR = 1e-2  # relative, of bfloat16 gradients
CHECKED_HEADS = 8  # compared with float32 scores, which take tokens^2 * 4 bytes a head
TILINGS = {  # (block, stages, heads that share L2)
    "forward": ((128, 2, 8), (128, 2, 4), (128, 2, 16), (64, 4, 8), (64, 3, 8)),
    "query gradients": ((64, 3, 8), (64, 3, 4), (64, 2, 8)),
    "key gradients": ((64, 3, 8), (64, 3, 4), (64, 2, 8)),
    "value gradients": ((64, 3, 8), (64, 4, 8), (64, 2, 8)),
}
KERNELS = {
    "forward": (gpu_forward.forward, gpu_forward.Config),
    "query gradients": (gpu_backward.query_gradients, gpu_backward.Config),
    "key gradients": (gpu_backward_keys.key_gradients, gpu_backward.Config),
    "value gradients": (gpu_backward_keys.value_gradients, gpu_backward.Config),
}
WIDTHS = {  # of the products of T x T / 2 that a kernel is for: the rest is done again
    "forward": NOPE + ROPE + VALUE,
    "query gradients": 2 * (NOPE + ROPE) + VALUE,
    "key gradients": 2 * (NOPE + ROPE) + VALUE,
    "value gradients": NOPE + ROPE + VALUE,
}
BACKWARD_WIDTH = 3 * (NOPE + ROPE) + 2 * VALUE


def operands(seed: int) -> tuple[jax.Array, ...]:
    """q_nope, q_rope, k_nope, k_rope, v and a gradient of the output, batch 1."""
    T, N = _TOKENS.value, _HEADS.value
    shapes = [(1, T, N, width) for width in (NOPE, ROPE, NOPE, VALUE, VALUE)]
    shapes.insert(3, (1, T, ROPE))
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return tuple(jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True))


def some_heads(x: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(a[:, :, :CHECKED_HEADS] if a.ndim == 4 else a for a in x)


def relative_error(y: jax.Array, expected: jax.Array) -> float:
    y, expected = y.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))


def report(name: str, function, operand_sets, width: int) -> float:
    """A line of the table, and microseconds; `width`: of the useful products, summed."""
    try:
        compiled = jax.jit(function).lower(*operand_sets[0]).compile()
        time = microseconds(compiled, operand_sets)
    except Exception as error:  # one tiling may not fit: the others are still of interest
        print(f"| {name} | failed: {str(error).splitlines()[0][:90]} | |", flush=True)
        return float("nan")
    flops = _TOKENS.value**2 * _HEADS.value * width
    print(f"| {name} | {time:.0f} | {flops / time / 1e6:.0f} |", flush=True)
    return time


def attend_padded(*inputs):
    return attention_cudnn.attend(*inputs, None, SCALE)


def attend(*inputs):
    return mla_attention(*inputs, scale=SCALE, implementation="hopper")


def with_gradients(attend):
    """Output and gradients: both passes of `attend`, given the inputs and do."""

    def both(*inputs_do):
        o_BTNH, pull = jax.vjp(attend, *inputs_do[:-1])
        return o_BTNH, *pull(inputs_do[-1])

    return both


def check() -> bool:
    """Prints the errors of some heads against float32; whether ours are within MAX_ERROR."""
    inputs_do = some_heads(operands(9))
    wide = [x.astype(jnp.float32) for x in inputs_do]
    expected = with_gradients(lambda *x: mla_attention_reference(*x, None, SCALE)[0])(*wide)
    for name, attention in (("ours", attend), ("cuDNN padded", attend_padded)):
        results = jax.jit(with_gradients(attention))(*inputs_do)
        errors = [relative_error(y, e) for y, e in zip(results, expected, strict=True)]
        shown = ", ".join(f"{error:.1e}" for error in errors)
        print(f"errors of {name} (o, dq_nope, dq_rope, dk_nope, dk_rope, dv): {shown}")
        if name == "ours":
            is_right = all(error <= MAX_ERROR for error in errors)  # NaN is not
    return is_right


def main(argv: list[str]) -> None:
    if len(argv) > 1 or jax.default_backend() != "gpu":
        print("bench_attention: takes no arguments, needs an NVIDIA GPU", file=sys.stderr)
        sys.exit(2)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    is_right = check()
    print("| what | us | TFLOP/s |\n|---|---|---|")
    sets = [operands(seed) for seed in range(2)]
    inputs = [x[:-1] for x in sets]
    forward, both = WIDTHS["forward"], WIDTHS["forward"] + BACKWARD_WIDTH
    ratios = {}
    for what, of_inputs, given, width in (
        ("forward", lambda function: function, inputs, forward),
        ("forward + backward", with_gradients, sets, both),
    ):
        padded = report(f"cuDNN padded, {what}", of_inputs(attend_padded), given, width)
        ours = report(f"ours, {what}", of_inputs(attend), given, width)
        ratios[f"attention, {what}: cuDNN / ours"] = padded / ours
    if _TILINGS.value:
        report_tilings(sets)
    kind = jax.devices()[0].device_kind
    is_kept = [regression.holds(kind, name, ratio) for name, ratio in ratios.items()]
    if not is_right:
        print(f"WRONG: an error of ours is above {MAX_ERROR}", file=sys.stderr)
    if not (is_right and all(is_kept)):
        sys.exit(1)


def report_tilings(sets: list[tuple[jax.Array, ...]]) -> None:
    """Each kernel alone."""
    residuals = []
    for *x, do_BTNH in sets:
        o_BTNH, lse_BNT = jax.jit(lambda *x: gpu_forward.forward(*x, None, SCALE))(*x)
        residuals.append((*x, do_BTNH, lse_BNT, jnp.zeros_like(lse_BNT)))
    for name, (kernel, config) in KERNELS.items():
        for tiling in TILINGS[name]:
            chosen = config(*tiling)

            def run(*x, kernel=kernel, chosen=chosen):
                return kernel(*x[:5], None, SCALE, *x[5:], config=chosen)

            given = [x[:5] for x in residuals] if name == "forward" else residuals
            report(f"{name} {tiling}", run, given, WIDTHS[name])


if __name__ == "__main__":
    app.run(main)

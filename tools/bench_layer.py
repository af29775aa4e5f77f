"""One MoE layer at V3's width, forward and backward, in FP8 and in bfloat16 on one GPU.

    python -m tools.bench_layer [--part=block] [--experts=32] [--tokens=4096] [--kernels=12]
        [--peer=compiled,eager] [--cast_before=false]

The layer holds `experts` of V3's 256 routed experts, as one device of an expert-parallel group
does, and every token goes to 8 of them. Masters and gradients are float32. FP8 weights are
quantised once a step, so their time stands apart. In bfloat16 the training step casts the masters
in every micro-batch; 'cast before' is the same layer without those casts. The peer is the block of
the transformers package in a process of its own, weights and gradients in bfloat16. Exit code 1: a
ratio fell behind the recorded one (`regression.py`).
"""

import dataclasses
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from dsv3_jax import configs
from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError, run_main
from pallas_kernels import regression
from tools.bench_peer import run_process

_PART = flags.DEFINE_enum("part", "block", ["block", "moe"], "attention and MoE, or MoE alone")
_EXPERTS = flags.DEFINE_integer("experts", 32, "routed experts here", lower_bound=8)
_TOKENS = flags.DEFINE_integer("tokens", 4096, "of one sequence", lower_bound=1)
_KERNELS = flags.DEFINE_integer("kernels", 12, "most expensive kernels listed", lower_bound=0)
_PEER = flags.DEFINE_list("peer", [], "of --part=block: compiled, eager")
_CAST_BEFORE = flags.DEFINE_bool("cast_before", True, "time that variant too")
_REMAT = flags.DEFINE_enum("remat", "paper", ["none", "paper"], "what the backward pass recomputes")

VARIANTS = ("fp8", "bfloat16", "bfloat16, cast before")


def make_layer(variant: str) -> tuple[Callable, Callable, tuple[Any, ...]]:
    """The layer of the flags.

    Returns:
      `prepare(params)`, what happens to the masters once a step; `passes(prepared, params, bias,
      x_BTD, dy_BTD)`, the gradients of x and of the masters; and (params, bias, x_BTD, dy_BTD).
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsv3_jax.model import rope
    from dsv3_jax.model.block import Block, remat
    from dsv3_jax.model.moe import MoE
    from dsv3_jax.model.router import RouterBias
    from dsv3_jax.model.runtime import Runtime
    from dsv3_jax.precision.fp8_weight import as_fp8, with_masters
    from dsv3_jax.precision.policy import PUBLISHED, is_fp8

    model = layer_model()
    dtype = jnp.dtype(jnp.bfloat16)
    recipe = PUBLISHED if variant == "fp8" else None
    runtime = Runtime(compute_dtype=dtype, fp8=recipe, remat=_REMAT.value)
    cos_sin = rope.cos_sin(rope.positions(_TOKENS.value, None), model)

    def create():
        kind = MoE if _PART.value == "moe" else partial_block
        return kind(model, runtime=runtime, rngs=nnx.Rngs(0))

    def partial_block(*args, **kwargs):
        return Block(*args, moe=True, **kwargs)

    graphdef, _, _ = nnx.split(nnx.eval_shape(create), nnx.Param, RouterBias)

    @jax.jit
    def init():
        _, params, bias = nnx.split(create(), nnx.Param, RouterBias)
        shape = (1, _TOKENS.value, model.width)
        x_BTD, dy_BTD = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (1, 2))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(bias), x_BTD, dy_BTD

    def prepare(params):
        def one(path, master):
            if not is_fp8(tuple(entry.key for entry in path)):
                return master
            return as_fp8(master, PUBLISHED) if variant == "fp8" else master.astype(dtype)

        return params if variant == "bfloat16" else jax.tree_util.tree_map_with_path(one, params)

    def passes(prepared, params, bias, x_BTD, dy_BTD):
        def layer(x_BTD, params):
            if variant == "fp8":
                params = with_masters(prepared, params)
            options = {} if _PART.value == "moe" else {"cos_sin": cos_sin}
            return nnx.merge(graphdef, params, bias)(x_BTD, **options)[0]

        layer = remat(layer, runtime, in_scan=False)
        _, backward = jax.vjp(layer, x_BTD, params if variant == "fp8" else prepared)
        return backward(dy_BTD)

    return prepare, passes, init()


def layer_model() -> ModelConfig:
    v3 = configs.get("deepseek_v3_671b").model
    return dataclasses.replace(v3, num_experts=_EXPERTS.value, num_groups=1, num_groups_kept=1)


def measure_peer(peer: str) -> dict:
    """{'ms': ...} of the peer's block, or {'error': ...}."""
    spec = {"model": dataclasses.asdict(layer_model()), "length": _TOKENS.value, "steps": 10}
    spec |= {"layer": True, "compiled": peer == "compiled"}
    with tempfile.TemporaryDirectory() as folder:
        spec_path, result_path = Path(folder) / "spec.json", Path(folder) / "result.json"
        spec_path.write_text(json.dumps(spec))
        return run_process(["tools.bench_peer", str(spec_path), str(result_path)], result_path)


def layer_flops() -> float:
    """Useful FLOPs of both passes: 6 a weight and token, attention at half its square."""
    model = configs.get("deepseek_v3_671b").model
    experts = model.experts_per_token + model.num_shared_experts
    per_token = 3 * model.width * model.expert_ffn_width * experts
    per_pair = 0
    if _PART.value == "block":
        D, Q, L, R = model.width, model.q_latent_dim, model.kv_latent_dim, model.qk_rope_head_dim
        queries = model.num_heads * model.qk_head_dim
        keys_values = model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)
        outputs = model.num_heads * model.v_head_dim
        per_token += D * Q + Q * queries + D * (L + R) + L * keys_values + outputs * D
        per_pair = model.num_heads * (model.qk_head_dim + model.v_head_dim) / 2
    return 6.0 * _TOKENS.value * (per_token + per_pair * _TOKENS.value)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    if unknown := set(_PEER.value) - {"compiled", "eager"}:
        raise UserError(f"--peer={','.join(unknown)} is unknown; allowed: compiled, eager")
    # Before jax takes the GPU's memory.
    peers = {peer: measure_peer(peer) for peer in _PEER.value}
    import jax

    if jax.default_backend() != "gpu":
        raise UserError("bench_layer times kernels of an NVIDIA GPU; there is none here")
    from pallas_kernels.timing import kernel_times

    print(f"{jax.devices()[0].device_kind}, {_PART.value}, {_TOKENS.value} tokens, "
          f"{_EXPERTS.value} experts, remat {_REMAT.value}")  # fmt: skip
    totals = {}
    variants = VARIANTS if _CAST_BEFORE.value else VARIANTS[:2]
    for variant in variants:
        prepare, passes, operands = make_layer(variant)
        params, *rest = operands
        prepare = jax.jit(prepare)
        once = sum(kernel_times(prepare, [(params,)], 5).values()) if variant != "bfloat16" else 0
        prepared = prepare(params)
        passes = jax.jit(passes).lower(prepared, params, *rest).compile()
        times = kernel_times(passes, [(prepared, params, *rest)], 10)
        totals[variant] = sum(times.values())
        print(
            f"{variant}: {totals[variant] / 1e3:.2f} ms, "
            f"{layer_flops() / totals[variant] / 1e6:.0f} TFLOP/s; once a step {once / 1e3:.2f} ms"
        )
        for name, time in sorted(times.items(), key=lambda item: -item[1])[: _KERNELS.value]:
            print(f"    {time:9.1f} us  {name[:90]}")
        del prepared, params, rest, operands
    kind = jax.devices()[0].device_kind
    case = f"{_PART.value}, {_TOKENS.value} tokens, remat {_REMAT.value}"
    kept = [
        regression.holds(kind, f"{case}: {variant} / fp8", totals[variant] / totals["fp8"])
        for variant in variants[1:]
    ]
    for peer, found in peers.items():
        if "error" in found:
            print(f"peer, {peer}: failed: {found['error'][:200]}")
            continue
        ratio = 1e3 * found["ms"] / totals["fp8"]
        print(
            f"peer, {peer}: {found['ms']:.2f} ms, {found['attention']}; "
            f"{_TOKENS.value / found['ms'] * 1e3:,.0f} tokens/s"
        )
        kept.append(regression.holds(kind, f"{case}: peer {peer} / fp8", ratio))
    return int(not all(kept))


if __name__ == "__main__":
    run_main(main)

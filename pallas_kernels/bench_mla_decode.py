"""Speed of decoding by absorbed MLA on a Hopper GPU beside plain XLA, in one run.

    python -m pallas_kernels.bench_mla_decode [--tokens=4096] [--parts=1,2,4]

Times are those of `timing`. Rates count two products a token and head, of 576 and of 512 numbers,
and the bytes of the latents once. Exit code 1: an error against float32 above 1e-2.
"""

import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.paged_cache import PagedCache, Paging, paged_attention
from pallas_kernels.mla_decode import mla_decode
from pallas_kernels.mla_decode.gpu import Config, mla_decode_hopper
from pallas_kernels.mla_decode.reference import mla_decode_reference
from pallas_kernels.timing import microseconds

_TOKENS = flags.DEFINE_integer("tokens", 4096, "of each row", lower_bound=64)
_PARTS = flags.DEFINE_list("parts", [], "parts of a row to try besides the default")

CASES = ((128, 128, 1), (128, 16, 1), (32, 128, 1), (1, 128, 1), (32, 128, 2))  # rows, heads, new
LATENT, ROPE, PAGE = 512, 64, 64
SCALE = 192**-0.5
MAX_ERROR = 1e-2


def operands(rows: int, heads: int, num_new: int, seed: int) -> tuple[jax.Array, ...]:
    """Those of `mla_decode` but the scale; pages in random order, one layer."""
    pages = _TOKENS.value // PAGE
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(rows, num_new, heads, width) for width in (LATENT, ROPE)]
    shapes += [(1, 1 + rows * pages, PAGE, width) for width in (LATENT, ROPE)]
    arrays = [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys[:4], shapes, strict=True)
    ]
    pages_BZ = 1 + jax.random.permutation(keys[4], rows * pages).reshape(rows, pages)
    position_BT = jnp.full((rows, 1), _TOKENS.value - num_new) + jnp.arange(num_new)
    return *arrays, jnp.int32(0), pages_BZ.astype(jnp.int32), position_BT.astype(jnp.int32)


def plain(q_latent, q_rope, latent, k_rope, layer, pages_BZ, position_BT):
    """As the model does it (`MLA.absorbed_paged`)."""
    bits = [jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (latent, k_rope)]

    def dot(subscripts, *arrays):
        return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)

    def scores(latents: LatentCache):
        scores_BNTS = dot("BTNL,BSL->BNTS", q_latent, latents.latent_BSL)
        scores_BNTS += dot("BTNR,BSR->BNTS", q_rope, latents.k_rope_BSR)
        return scores_BNTS * SCALE, latents.latent_BSL

    def weigh(p_BNTS, latent_BSL):
        return dot("BNTS,BSL->BNTL", p_BNTS.astype(latent_BSL.dtype), latent_BSL)

    return paged_attention(
        *(PagedCache(*bits, None), layer, Paging(pages_BZ, position_BT, position_BT >= 0)),
        *(scores, weigh),
        num_heads=q_latent.shape[2],
        width=LATENT,
        dtype=jnp.dtype(jnp.bfloat16),
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1 or jax.default_backend() != "gpu":
        print("bench_mla_decode: takes no arguments, needs an NVIDIA GPU", file=sys.stderr)
        sys.exit(2)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_TOKENS.value} tokens a row")
    given = operands(3, 128, 2, 9)
    found = jax.jit(lambda *x: mla_decode(*x, SCALE, implementation="hopper"))(*given)
    wanted = mla_decode_reference(*given, SCALE).astype(jnp.float32)
    error = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
    print(f"error against float32: {error:.1e}", flush=True)
    print("| rows, heads, new tokens | what | us | TFLOP/s | TB/s |\n|---|---|---|---|---|")
    for rows, heads, num_new in CASES:
        sets = [operands(rows, heads, num_new, seed) for seed in range(2)]
        tokens = rows * _TOKENS.value
        flops = 2 * tokens * heads * num_new * (2 * LATENT + ROPE)
        read = 2 * tokens * (LATENT + ROPE)
        functions = {"ours": Config(), **{f"{p} parts": Config(int(p)) for p in _PARTS.value}}
        functions = {
            name: lambda *x, config=config: mla_decode_hopper(*x, SCALE, config=config)
            for name, config in functions.items()
        } | {"XLA": plain}
        for name, function in functions.items():
            try:
                time = microseconds(jax.jit(function).lower(*sets[0]).compile(), sets, 10)
            except Exception as problem:  # one case may not fit: the others are still of interest
                print(f"| {rows}, {heads}, {num_new} | {name} failed: {str(problem)[:90]} | | | |")
                continue
            print(
                f"| {rows}, {heads}, {num_new} | {name} | {time:.0f} | {flops / time / 1e6:.0f} "
                f"| {read / time / 1e6:.2f} |",
                flush=True,
            )
    sys.exit(int(not error <= MAX_ERROR))


if __name__ == "__main__":
    app.run(main)

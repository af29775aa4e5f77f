"""Speed of decoding by absorbed MLA on a Hopper GPU beside plain XLA, in one run.

    python -m pallas_kernels.bench_mla_decode [--cache=bfloat16,fp8] [--tokens=4096]
        [--variants=keys=32/stages=4,parts=2] [--cases=1]

Times are those of `timing`. Rates count two products a token and head, of 576 and of 512 numbers,
and the bytes of the cache once. Exit code 1: an error against float32 above 1e-2.
"""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
from absl import app, flags

from dsv3_jax.model.cache import LatentCache
from dsv3_jax.model.paged_cache import PagedCache, Paging, paged_attention
from pallas_kernels.mla_decode.gpu import DEFAULT, DEFAULT_CODES, Config, mla_decode_hopper
from pallas_kernels.mla_decode.reference import mla_decode_reference
from pallas_kernels.quantize.reference import quantize_tiles_reference
from pallas_kernels.timing import microseconds

_TOKENS = flags.DEFINE_integer("tokens", 4096, "of each row", lower_bound=64)
_CACHE = flags.DEFINE_list("cache", ["bfloat16"], "formats: 'bfloat16', 'fp8'")
_CASES = flags.DEFINE_list("cases", [], "numbers of the cases to run, from 0; none: all")
_VARIANTS = flags.DEFINE_list(
    "variants", [], "changes of the default `Config` to try too; fields of one joined by '/'"
)

CASES = ((128, 128, 1), (128, 16, 1), (32, 128, 1), (1, 128, 1), (32, 128, 2))  # rows, heads, new
LATENT, ROPE, PAGE = 512, 64, 64
SCALE = 192**-0.5
MAX_ERROR = 1e-2


def operands(rows: int, heads: int, num_new: int, seed: int, cache: str) -> tuple:
    """Those of `mla_decode` but the scale, in its order; pages in random order, one layer."""
    pages = _TOKENS.value // PAGE
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = [(rows, num_new, heads, width) for width in (LATENT, ROPE)]
    shapes += [(1, 1 + rows * pages, PAGE, width) for width in (LATENT, ROPE)]
    *queries, latent, k_rope = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys[:4], shapes, strict=True)
    )
    pages_BZ = 1 + jax.random.permutation(keys[4], rows * pages).reshape(rows, pages)
    position_BT = jnp.full((rows, 1), _TOKENS.value - num_new) + jnp.arange(num_new)
    scales = None
    if cache == "fp8":
        latent, scales = jax.jit(codes)(latent)
    places = (jnp.int32(0), pages_BZ.astype(jnp.int32), position_BT.astype(jnp.int32))
    return *queries, latent, k_rope, *places, scales


def codes(latent: jax.Array) -> tuple[jax.Array, jax.Array]:
    code, scale = quantize_tiles_reference(latent.reshape(-1, LATENT))
    return code.reshape(latent.shape), jnp.swapaxes(scale.reshape(*latent.shape[:3], -1), 2, 3)


def plain(q_latent, q_rope, latent, k_rope, layer, pages_BZ, position_BT, scales):
    """As the model does it (`MLA.absorbed_paged`)."""
    bits = [
        jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}") for x in (latent, k_rope)
    ]

    def dot(subscripts, *arrays):
        return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32)

    def scores(latents: LatentCache):
        scores_BNTS = dot("BTNL,BSL->BNTS", q_latent, latents.latent_BSL)
        scores_BNTS += dot("BTNR,BSR->BNTS", q_rope, latents.k_rope_BSR)
        return scores_BNTS * SCALE, latents.latent_BSL

    def weigh(p_BNTS, latent_BSL):
        return dot("BNTS,BSL->BNTL", p_BNTS.astype(latent_BSL.dtype), latent_BSL)

    return paged_attention(
        *(PagedCache(*bits, scales), layer, Paging(pages_BZ, position_BT, position_BT >= 0)),
        *(scores, weigh),
        num_heads=q_latent.shape[2],
        width=LATENT,
        dtype=jnp.dtype(jnp.bfloat16),
    )


def kernel(config: Config):
    def run(*operands):
        *operands, scales = operands
        return mla_decode_hopper(*operands, SCALE, scales, config=config)

    return run


def configs(cache: str) -> dict[str, Config]:
    """The default and the variants, by name."""
    default = DEFAULT_CODES if cache == "fp8" else DEFAULT
    changes = {
        text: {name: int(value) for name, value in (x.split("=") for x in text.split("/"))}
        for text in _VARIANTS.value
    }
    return {"ours": default} | {text: replace(default, **x) for text, x in changes.items()}


def error_of(config: Config, cache: str) -> float:
    """Against float32, relative; of rows of three lengths."""
    *given, position_BT, scales = operands(3, 128, 2, 9, cache)
    position_BT -= jnp.array([[0], [700], [2000]]) % (_TOKENS.value - 2)
    arguments = (*given, position_BT)
    found = jax.jit(kernel(config))(*arguments, scales).astype(jnp.float32)
    wanted = mla_decode_reference(*arguments, SCALE, scales).astype(jnp.float32)
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


def main(argv: list[str]) -> None:
    if len(argv) > 1 or jax.default_backend() != "gpu":
        print("bench_mla_decode: takes no arguments, needs an NVIDIA GPU", file=sys.stderr)
        sys.exit(2)
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {_TOKENS.value} tokens a row")
    is_right = True
    for cache in _CACHE.value:
        for name, config in configs(cache).items():
            try:
                error = error_of(config, cache)
            except ValueError as problem:  # it needs more shared memory than there is
                print(f"{cache}, {name} failed: {str(problem)[:90]}")
                continue
            is_right &= error <= MAX_ERROR
            print(f"{cache}, {name}: error against float32 {error:.1e}", flush=True)
    print("| rows, heads, new tokens | cache, what | us | TFLOP/s | TB/s |\n|---|---|---|---|---|")
    for cache in _CACHE.value:
        for number in _CASES.value or range(len(CASES)):
            measure(cache, *CASES[int(number)])
    sys.exit(int(not is_right))


def measure(cache: str, rows: int, heads: int, num_new: int) -> None:
    sets = [operands(rows, heads, num_new, seed, cache) for seed in range(2)]
    tokens = rows * _TOKENS.value
    flops = 2 * tokens * heads * num_new * (2 * LATENT + ROPE)
    read = tokens * (2 * ROPE + (LATENT + 4 * LATENT // 128 if cache == "fp8" else 2 * LATENT))
    functions = {name: kernel(config) for name, config in configs(cache).items()} | {"XLA": plain}
    for name, function in functions.items():
        case = f"| {rows}, {heads}, {num_new} | {cache}, {name}"
        try:
            time = microseconds(jax.jit(function).lower(*sets[0]).compile(), sets, 10)
        except Exception as problem:  # one case may not fit: the others are still of interest
            print(f"{case} failed: {str(problem)[:90]} | | | |")
            continue
        rates = f"{flops / time / 1e6:.0f} | {read / time / 1e6:.2f}"
        print(f"{case} | {time:.0f} | {rates} |", flush=True)


if __name__ == "__main__":
    app.run(main)

"""Moving rows to the slots of their experts and back on one GPU, beside plain XLA and the copy.

    python -m pallas_kernels.bench_moe_permute

4,096 tokens of width 7,168, 8 experts each, in slots of 32 experts aligned to 128. Bytes count what
is read and written once. Exit code 1: a kernel differs from the definition.
"""

from functools import partial

from absl import flags

from dsv3_jax.errors import UserError, run_main

_TOKENS = flags.DEFINE_integer("tokens", 4096, "rows", lower_bound=1)

WIDTH, TOP_K, EXPERTS, ALIGNMENT = 7168, 8, 32, 128


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    import jax
    import jax.numpy as jnp
    import numpy as np

    if jax.default_backend() != "gpu":
        raise UserError("bench_moe_permute times kernels of an NVIDIA GPU; there is none here")
    from dsv3_jax.parallel.permute import align, sort_pairs
    from pallas_kernels import pack_rows, quantize_tiles
    from pallas_kernels.moe_permute import permute_packed_rows, unpermute_sum
    from pallas_kernels.timing import microseconds

    def operands(seed: int):
        rng = np.random.default_rng(seed)
        ids_XK = rng.random((_TOKENS.value, EXPERTS)).argsort(1)[:, :TOP_K].astype(np.int32)
        rows, _, _ = align(*sort_pairs(jnp.asarray(ids_XK), EXPERTS), ALIGNMENT)
        x_XD = jax.random.normal(jax.random.key(seed), (_TOKENS.value, WIDTH), jnp.bfloat16)
        shape = (rows.row_M.shape[0], WIDTH)
        y_MD = jax.random.normal(jax.random.key(seed + 9), shape, jnp.bfloat16)
        return pack_rows(*quantize_tiles(x_XD)), y_MD, rows

    sets = [operands(seed) for seed in range(3)]
    copy = jax.jit(lambda x: -x)
    moved = 2 * sets[0][1].nbytes
    time = microseconds(copy, [(y_MD,) for _, y_MD, _ in sets], 10)
    kind = jax.devices()[0].device_kind
    print(f"{kind}, {_TOKENS.value} tokens; copy {moved / time / 1e6:.2f} TB/s")
    print("| operation | us | TB/s | plain XLA / ours |\n|---|---|---|---|")
    same = True
    pairs = _TOKENS.value * TOP_K
    row = sets[0][0].shape[1]
    slots = sets[0][1].shape[0]
    cases = {
        "permute_packed_rows": (
            partial(permute_packed_rows, width=WIDTH),
            [(payload, rows.row_M) for payload, _, rows in sets],
            (_TOKENS.value + slots) * row,
        ),
        "unpermute_sum": (
            unpermute_sum,
            [(y_MD, rows.slot_XK) for _, y_MD, rows in sets],
            2 * WIDTH * (pairs + _TOKENS.value),
        ),
    }
    for name, (function, inputs, num_bytes) in cases.items():
        ours, plain = (
            jax.jit(partial(function, implementation=how)) for how in ("hopper", "reference")
        )
        for a, b in zip(
            jax.tree.leaves(ours(*inputs[0])), jax.tree.leaves(plain(*inputs[0])), strict=True
        ):
            same &= bool((a.astype(jnp.float32) == b.astype(jnp.float32)).all())
        times = [microseconds(how, inputs, 10) for how in (ours, plain)]
        print(
            f"| `{name}` | {times[0]:.1f} | {num_bytes / times[0] / 1e6:.2f} "
            f"| {times[1] / times[0]:.2f} |",
            flush=True,
        )
    return int(not same)


if __name__ == "__main__":
    run_main(main)

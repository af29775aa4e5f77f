"""Cross-entropy over V3's vocabulary on one GPU: time and memory beside its three products alone.

    python -m tools.bench_cross_entropy [--tokens=4096,16384] [--budgets=27,28]

Loss and gradients of `train/losses.py:cross_entropy`, against the products of the same shapes that
the logits, the hidden states' gradient and the head's need whatever else is done. Budgets are
log2 of the float32 logits held at once. Checks the loss and the gradients of the first 512 tokens
against float32 logits first.
"""

from absl import flags

from dsv3_jax import configs
from dsv3_jax.errors import UserError, run_main

_TOKENS = flags.DEFINE_list("tokens", ["4096", "16384"], "numbers of tokens")
_BUDGETS = flags.DEFINE_list("budgets", ["27"], "log2 of logits held at once")

MAX_ERROR = 1e-2  # relative, of gradients whose products take bfloat16
CHECKED_TOKENS = 512


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; see --help")
    import jax
    import jax.numpy as jnp

    from dsv3_jax.train.losses import cross_entropy

    if jax.default_backend() != "gpu":
        raise UserError("bench_cross_entropy times kernels of an NVIDIA GPU; there is none here")
    from pallas_kernels.timing import microseconds

    model = configs.get("deepseek_v3_671b").model
    D, V = model.width, model.vocab_size
    head_DV = 0.02 * jax.random.normal(jax.random.key(0), (D, V), jnp.float32)

    def operands(num_tokens: int):
        hidden_BTD = jax.random.normal(jax.random.key(1), (1, num_tokens, D), jnp.bfloat16)
        targets_BT = jax.random.randint(jax.random.key(2), (1, num_tokens), 0, V)
        return hidden_BTD, targets_BT

    def loss(budget: int):
        def of(hidden_BTD, head_DV, targets_BT):
            weights_BT = jnp.full(targets_BT.shape, 1 / targets_BT.size, jnp.float32)
            arguments = (hidden_BTD, head_DV, targets_BT, weights_BT)
            return cross_entropy(
                *arguments, compute_dtype=jnp.dtype(jnp.bfloat16), logits_budget=budget
            )

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1)))

    def direct(hidden_BTD, head_DV, targets_BT):
        logits_BTV = jnp.einsum("BTD,DV->BTV", hidden_BTD.astype(jnp.float32), head_DV)
        logprobs_BTV = jax.nn.log_softmax(logits_BTV)
        return -jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1).mean()

    hidden_BTD, targets_BT = operands(CHECKED_TOKENS)
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(jax.value_and_grad(direct, argnums=(0, 1)))(
            hidden_BTD, head_DV, targets_BT
        )
    found = loss(2**24)(hidden_BTD, head_DV, targets_BT)
    errors = [
        float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    ]
    print(f"errors of loss, d hidden, d head: {', '.join(f'{error:.1e}' for error in errors)}")
    del wanted, found

    @jax.jit
    def products(hidden_XD, head_DV, d_logits_XV):
        logits_XV = jnp.einsum("XD,DV->XV", hidden_XD, head_DV)
        d_hidden_XD = jnp.einsum("XV,DV->XD", d_logits_XV, head_DV)
        d_head_DV = jnp.einsum(
            "XD,XV->DV", hidden_XD, d_logits_XV, preferred_element_type=jnp.float32
        )
        return logits_XV, d_hidden_XD, d_head_DV

    print(f"{jax.devices()[0].device_kind}, width {D}, vocabulary {V}")
    for num_tokens in map(int, _TOKENS.value):
        hidden_BTD, targets_BT = operands(num_tokens)
        d_logits_XV = jax.random.normal(jax.random.key(3), (num_tokens, V), jnp.bfloat16)
        floor = microseconds(
            products, [(hidden_BTD[0], head_DV.astype(jnp.bfloat16), d_logits_XV)], 5
        )
        del d_logits_XV
        for exponent in map(int, _BUDGETS.value):
            arguments = (hidden_BTD, head_DV, targets_BT)
            compiled = loss(2**exponent).lower(*arguments).compile()
            time = microseconds(compiled, [arguments], 5)
            # The gradients, and the head in bfloat16, any implementation has.
            extra = compiled.memory_analysis().temp_size_in_bytes - 2 * head_DV.size
            logits = 4 * num_tokens * V
            print(
                f"{num_tokens} tokens, 2^{exponent} logits: {time / 1e3:.2f} ms, products alone "
                f"{floor / 1e3:.2f} ms, ratio {time / floor:.2f}; temporaries "
                f"{extra / 2**30:.2f} GiB beside the head in bfloat16, "
                f"{extra / logits:.1%} of all logits in float32",
                flush=True,
            )
    return int(not all(error <= MAX_ERROR for error in errors))


if __name__ == "__main__":
    run_main(main)

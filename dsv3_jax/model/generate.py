"""Decode executor: the model's blocks with a latent cache, naive for the prompt, then absorbed.

Shape letters: B batch, T prompt tokens, D width, V vocabulary.
"""

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.errors import UserError
from dsv3_jax.model import rope
from dsv3_jax.model.cache import LatentCache
from dsv3_jax.parallel.context import shard_tokens

if TYPE_CHECKING:
    from dsv3_jax.model.transformer import DeepSeekV3

Caches = dict[str, LatentCache]  # of each stack of blocks, with a leading layer dim


def generate(
    model: "DeepSeekV3",
    tokens_BT: jax.Array,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    speculative: bool,
) -> jax.Array:
    """Continues each row by exactly `max_new_tokens` tokens.

    Args:
      tokens_BT: int prompts of one length.
      temperature: 0 takes the most likely token; above, samples from softmax(logits / temperature).
      seed: the same seed gives the same tokens.
      speculative: MTP drafts tokens (`serve/speculative.py`), which changes the speed and, with a
        temperature, the random numbers, but neither greedy tokens nor any distribution.

    Returns:
      int32 [B, T + max_new_tokens], the prompt included.

    Raises:
      UserError: prompt, length or temperature are out of range, or there is no MTP to draft with.
    """
    tokens = np.asarray(tokens_BT)
    vocab = model.config.vocab_size
    if speculative and not model.config.mtp_depth:
        raise UserError("this model has no MTP module to draft with; use speculative=False")
    if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"the prompt is {tokens.dtype} {list(tokens.shape)}; "
            "it must be integers [rows, tokens] with at least one token a row"
        )
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise UserError(
            f"the prompt holds token {tokens.max() if tokens.min() >= 0 else tokens.min()}; "
            f"the model's vocabulary is 0..{vocab - 1}: encode with the model's own tokenizer"
        )
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} is too small; it must be at least 1")
    if temperature < 0:
        raise UserError(f"temperature={temperature} is negative; use 0 (greedy) or more")
    if speculative:
        return _speculative(model, tokens, max_new_tokens, temperature, seed)
    rows, mesh = len(tokens), model.runtime.mesh
    if mesh is not None:  # every device holds rows of its own
        padding = -rows % (mesh.shape["data"] * mesh.shape["expert"])
        tokens = np.pad(tokens, ((0, padding), (0, 0)), mode="edge")
    tokens = jnp.asarray(tokens, jnp.int32)
    graphdef, state = nnx.split(model)
    logits_BV, caches = _prefill(graphdef, state, tokens, tokens.shape[1] + max_new_tokens - 1)
    new_tokens, _ = _decode(
        graphdef,
        state,
        caches,
        logits_BV,
        tokens.shape[1],
        jax.random.key(seed),
        jnp.float32(temperature),
        max_new_tokens,
        temperature == 0,
    )
    return jnp.concatenate([tokens, new_tokens], axis=1)[:rows]


def _speculative(model, tokens, max_new_tokens: int, temperature: float, seed: int) -> jax.Array:
    """By an engine with all rows at once."""
    from dsv3_jax.serve.engine import Engine  # it knows this module
    from dsv3_jax.serve.requests import EngineOptions, Request, Sampling

    (num_rows, length), mesh = tokens.shape, model.runtime.mesh
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]
    options = EngineOptions(
        max_rows=-(-num_rows // shards) * shards,
        context_tokens=length + max_new_tokens,
        prefill_chunk=min(length, 256),
        cache_dtype=model.runtime.compute_dtype.name,
        num_draft_tokens=model.config.mtp_depth,
        max_queue=num_rows,
        prefix_reuse=False,
    )
    engine, texts = Engine(model, options), {}
    for row, prompt in enumerate(tokens.tolist()):
        row_seed = int(np.random.SeedSequence([seed % 2**64, row]).generate_state(1)[0])
        sampling = Sampling(temperature=temperature, seed=row_seed)
        request = Request(prompt=tuple(prompt), max_tokens=max_new_tokens, sampling=sampling)
        texts[engine.submit(request)] = list(prompt)
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.tokens
    return jnp.asarray(list(texts.values()), jnp.int32)


def stacks(model: "DeepSeekV3"):
    """The name, graph and weights of each stack of blocks, in order."""
    for name in ("dense_blocks", "moe_blocks"):
        if getattr(model, name) is not None:
            yield name, nnx.split(getattr(model, name))


@partial(jax.jit, static_argnums=(0, 3))
def _prefill(graphdef, state, tokens_BT, cache_tokens: int) -> tuple[jax.Array, Caches]:
    """Runs the prompt: logits after its last token, and caches with room for `cache_tokens`."""
    model = nnx.merge(graphdef, state)
    cos_sin = rope.cos_sin(rope.positions(tokens_BT.shape[1]), model.config)
    x_BTD = shard_tokens(model.embed(tokens_BT), model.runtime.mesh)
    caches = {}
    for name, (block, stack) in stacks(model):

        def layer(x_BTD, layer_state, block=block):
            return nnx.merge(block, layer_state).prefill(x_BTD, cos_sin=cos_sin)

        x_BTD, latents = jax.lax.scan(layer, x_BTD, stack)
        caches[name] = latents.padded(cache_tokens)
    return model.logits(model.final_norm(x_BTD[:, -1])), caches


def _step(model, token_B, position, caches: Caches) -> tuple[jax.Array, Caches]:
    """Logits [B, V] after one more token at `position`, and the caches with it."""
    cos_sin = rope.cos_sin(position[None, None], model.config)
    x_BTD = shard_tokens(model.embed(token_B[:, None]), model.runtime.mesh)
    caches = dict(caches)
    for name, (block, stack) in stacks(model):

        def layer(carry, inputs, block=block):
            x_BTD, cache = carry
            index, layer_state = inputs
            decode = nnx.merge(block, layer_state).decode
            return decode(x_BTD, cache, index, position, cos_sin=cos_sin), None

        num_layers = caches[name].latent_BSL.shape[0]
        carry = (x_BTD, caches[name])
        carry, _ = jax.lax.scan(layer, carry, (jnp.arange(num_layers), stack))
        x_BTD, caches[name] = carry
    return model.logits(model.final_norm(x_BTD[:, -1])), caches


@partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=2)
def _decode(
    graphdef,
    state,
    caches,
    logits_BV,
    prompt_tokens,
    key,
    temperature,
    num_tokens: int,
    greedy: bool,
) -> tuple[jax.Array, Caches]:
    """Picks `num_tokens` tokens, the first from the prompt's logits: int32 [B, num_tokens].

    The caches come back because donated buffers are reused for outputs only.
    """
    model = nnx.merge(graphdef, state)

    def pick(logits_BV, index):
        if greedy:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        noise = jax.random.fold_in(key, index)
        return jax.random.categorical(noise, logits_BV / temperature).astype(jnp.int32)

    def step(carry, index):
        token_B, caches = carry
        logits_BV, caches = _step(model, token_B, prompt_tokens + index, caches)
        token_B = pick(logits_BV, index + 1)
        return (token_B, caches), token_B

    first_B = pick(logits_BV, 0)
    (_, caches), rest = jax.lax.scan(step, (first_B, caches), jnp.arange(num_tokens - 1))
    return jnp.concatenate([first_B[None], rest]).T, caches

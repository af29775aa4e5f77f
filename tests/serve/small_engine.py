"""A small model with sharp random weights, requests for it, and what its text must be."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.config import YarnConfig
from dsv3_jax.configs.tiny import tiny
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling

CONFIG = dataclasses.replace(
    tiny().model,
    vocab_size=64,
    width=32,
    num_layers=3,
    dense_ffn_width=48,
    expert_ffn_width=16,
    num_heads=2,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    q_latent_dim=20,
    kv_latent_dim=12,
    mtp_depth=1,
    yarn=YarnConfig(enabled=True, original_length=8, factor=4.0),
    init_std=0.3,
)
CONTEXT = 48
# Two long requests fill the pages: others wait, and what ended ones left is evicted.
OPTIONS = EngineOptions(
    max_rows=4,
    context_tokens=CONTEXT,
    page_tokens=4,
    num_pages=24,
    prefill_chunk=8,
    cache_dtype="float32",
)
GREEDY = Sampling(temperature=0.0)


@functools.cache
def make_model(mesh: Mesh | None = None, *, config=CONFIG) -> DeepSeekV3:
    """Random weights, gains and router biases, none of them at its initial value.

    Attention and FFN add little to an embedding, and MTP's projection passes on that of the next
    token: so its drafts are often, but not always, what the model itself chooses.
    """
    runtime = Runtime(mesh=mesh)
    model = nnx.eval_shape(lambda: DeepSeekV3(config, runtime=runtime, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(0)

    def value(path, x):
        noise = rng.standard_normal(x.shape).astype(np.float32)
        name = jax.tree_util.keystr(path)
        if "gain" in name:
            return jnp.asarray(1.0 + 0.1 * noise)
        if "proj" in name:
            return jnp.asarray(np.eye(*x.shape[1:])[None] + 0.03 * noise, jnp.float32)
        scale = {"'wo'": 0.2, "'w2'": 0.04, "embed": 4.0}
        factor = next((f for part, f in scale.items() if part in name), 1.0)
        return jnp.asarray(factor * config.init_std * noise)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(value, state))


@functools.cache
def eight_devices() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 4), ("pipe", "data", "expert"))


def requests_of(seed: int, count: int, sampling=GREEDY, **fields) -> list[Request]:
    """Prompts and outputs of mixed lengths; about half begin like another one."""
    rng = np.random.default_rng(seed)
    made: list[Request] = []
    for _ in range(count):
        prompt = rng.integers(0, CONFIG.vocab_size, rng.integers(1, 27)).tolist()
        if made and rng.random() < 0.5:
            prompt = [*made[rng.integers(len(made))].prompt[:16], *prompt[:9]]
        max_tokens = int(rng.integers(1, CONTEXT - len(prompt) + 1))
        made.append(
            Request(prompt=tuple(prompt), max_tokens=max_tokens, sampling=sampling, **fields)
        )
    return made


def seeded(requests: list[Request], **settings) -> list[Request]:
    """The same requests, sampled, each with a seed of its own."""
    return [
        dataclasses.replace(request, sampling=Sampling(seed=i, **settings))
        for i, request in enumerate(requests)
    ]


def run(engine, requests: list[Request]) -> list[list[int]]:
    """Submits all requests, steps until nothing is left, and returns their new tokens."""
    ids = [engine.submit(request) for request in requests]
    texts: dict[int, list[int]] = {i: [] for i in ids}
    ended = set()
    for _ in range(60 * len(requests)):  # each takes fewer steps alone
        if not engine.has_work:
            break
        for output in engine.step():
            assert output.request_id not in ended, "something came after the end"
            texts[output.request_id] += output.tokens
            if output.finish_reason:
                ended.add(output.request_id)
    assert not engine.has_work and ended == set(ids)
    return [texts[i] for i in ids]


def forced_logits(
    model, requests: list[Request], outputs: list[list[int]], longest: int = CONTEXT
) -> list[np.ndarray]:
    """float32 [new tokens, V] of each request: teacher forcing on its text."""
    tokens = np.zeros((len(requests), longest), np.int32)  # attention is causal: zeros come after
    for row, (request, output) in enumerate(zip(requests, outputs, strict=True)):
        text = [*request.prompt, *output]
        tokens[row, : len(text)] = text
    logits = np.asarray(model(tokens))
    starts = [len(request.prompt) - 1 for request in requests]
    return [
        row[start : start + len(output)]
        for row, start, output in zip(logits, starts, outputs, strict=True)
    ]


def differing_tokens(model, requests, outputs, longest: int = CONTEXT) -> int:
    """Output tokens that are not the argmax of teacher forcing."""
    forced = forced_logits(model, requests, outputs, longest)
    return sum(
        int((logits.argmax(-1) != output).sum())
        for logits, output in zip(forced, outputs, strict=True)
    )

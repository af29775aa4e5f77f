"""Answers sampled from the policy in training, and the rows that its update is computed on.

Weights are handed over in memory: the engine reads the arrays of the training state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled answer, as token ids; `answer` ends with EOS where `finish_reason` is 'stop'."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    finish_reason: str  # 'stop', 'length'; 'error': logits were not numbers, and no answer


def sample_answers(
    model: DeepSeekV3,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_tokens: int,
    context_tokens: int,
    temperature: float,
    seed: int,
    eos_id: int,
    max_rows: int,
) -> list[Rollout]:
    """`group_size` answers to each prompt, those to one prompt together.

    Args:
      model: merged with the weights to sample from. They are read and kept no longer than this
        call, so a step that takes them as its own may follow.
      max_tokens: of an answer.
      context_tokens: prompt and answer together, at most; each prompt must leave room for an answer
        of `max_tokens`.
      seed: each answer's own seed follows from it and the answer's number.
      max_rows: answers decoded together, rounded up to the mesh.
    """
    mesh, total = model.runtime.mesh, len(prompts) * group_size
    shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]
    options = EngineOptions(
        max_rows=-(-max_rows // shards) * shards,
        context_tokens=context_tokens,
        page_tokens=min(64, context_tokens),
        prefill_chunk=min(256, context_tokens),
        cache_dtype=model.runtime.compute_dtype.name,
        max_queue=total,
    )
    # A new one: what an older one has cached was computed with older weights. The compiled programs
    # are shared by all engines of these sizes.
    engine = Engine(model, options)
    seeds = np.random.SeedSequence(seed).generate_state(total) >> 1
    answers: dict[int, list[int]] = {}
    for number in range(total):
        request = Request(
            prompt=tuple(prompts[number // group_size]),
            max_tokens=max_tokens,
            sampling=Sampling(temperature=temperature, seed=int(seeds[number])),
            stop_ids=frozenset({eos_id}),
        )
        answers[engine.submit(request)] = []
    reasons: dict[int, str] = {}
    while engine.has_work:
        for output in engine.step():
            answers[output.request_id] += output.tokens
            if output.finish_reason is not None:
                reasons[output.request_id] = output.finish_reason
    return [
        Rollout(
            prompt=tuple(prompts[number // group_size]),
            answer=() if reasons[request_id] == "error" else tuple(answer),
            finish_reason=reasons[request_id],
        )
        for number, (request_id, answer) in enumerate(answers.items())
    ]


def policy_rows(rollouts: Sequence[Rollout], sequence_length: int) -> dict[str, np.ndarray]:
    """Rows of T = `sequence_length` inputs, one an answer.

    Returns:
      "tokens" int32 [N, T+1]: prompt, answer, padding; "segments" int32 [N, T+1]: 1, and 0 for
      padding; "mask" bool [N, T]: positions whose next token is of the answer.
    """
    count, width = len(rollouts), sequence_length + 1
    tokens, segments = np.zeros((2, count, width), np.int32)
    mask = np.zeros((count, sequence_length), bool)
    for row, rollout in enumerate(rollouts):
        text = [*rollout.prompt, *rollout.answer]
        tokens[row, : len(text)] = text
        segments[row, : len(text)] = 1
        mask[row, len(rollout.prompt) - 1 : len(text) - 1] = True
    return {"tokens": tokens, "segments": segments, "mask": mask}

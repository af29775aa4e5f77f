"""The endpoint of this process: a serving engine on a checkpoint."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp

from dsv3_jax.checkpoint.pretrained import load_model, load_run_tokenizer
from dsv3_jax.data.chat import ChatTemplate, encode_chat, load_chat_template
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.evals.endpoint import Answer, Prompt, SamplingOptions
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve.answers import Choice, Piece
from dsv3_jax.serve.engine import Engine
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling
from dsv3_jax.serve.text import TokenBytes


class LocalEndpoint:
    """Answers with an engine of its own; see `endpoint.Endpoint`."""

    def __init__(
        self,
        model: DeepSeekV3,
        options: EngineOptions,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
    ):
        """`template`: of conversations; None: the built-in one."""
        self.model, self.tokenizer = model, tokenizer
        self._engine = Engine(model, options)
        self._template = template or ChatTemplate()
        self._bytes = TokenBytes(tokenizer)

    def complete(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Answer]:
        """As the protocol says; a prompt without room for `max_tokens` has the error 'too long'.

        Raises:
          UserError: options that no engine takes.
        """
        answers: list[Answer] = [Answer(error="too long")] * len(prompts)
        waiting = list(enumerate(prompts))[::-1]
        running: dict[int, tuple[int, Choice, Piece]] = {}
        while waiting or running:
            while waiting and len(running) < self._engine.options.max_queue:
                index, prompt = waiting.pop()
                request = self._request(index, prompt, options)
                room = self._engine.options.context_tokens - len(request.prompt)
                if options.max_tokens > room:
                    continue
                request_id = self._engine.submit(request)
                choice = Choice(self._bytes, options.stop, request.stop_ids)
                running[request_id] = (index, choice, Piece())
            for output in self._engine.step():
                if output.request_id not in running:
                    continue  # ended by a stop string; this is its cancellation
                index, choice, piece = running[output.request_id]
                piece += choice.push(output)
                running[output.request_id] = (index, choice, piece)
                if piece.finish_reason is None:
                    continue
                del running[output.request_id]
                if output.finish_reason is None:
                    self._engine.cancel(output.request_id)
                if piece.finish_reason == "error":
                    answers[index] = Answer(error="logits are not numbers")
                else:
                    answers[index] = Answer(text=piece.text, finish_reason=piece.finish_reason)
        return answers

    def _request(self, index: int, prompt: Prompt, options: SamplingOptions) -> Request:
        if isinstance(prompt, str):
            ids = [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        else:
            ids = encode_chat(self.tokenizer, self._template, prompt, add_generation_prompt=True)
        return Request(
            prompt=tuple(ids),
            max_tokens=options.max_tokens,
            sampling=Sampling(
                temperature=options.temperature,
                top_p=options.top_p,
                seed=((options.seed or 0) + index) % 2**31,
            ),
            stop_ids=frozenset({self.tokenizer.eos_id}),
        )


def load_endpoint(
    path: str | Path, *, dtype: str = "float32", context_tokens: int = 4096, max_rows: int = 8
) -> LocalEndpoint:
    """An engine on a Hugging Face folder or a run of ours.

    Args:
      dtype: of weights, arithmetic and cache, 'float32' or 'bfloat16'.
      context_tokens: prompt and answer together, at most.
      max_rows: prompts answered together.

    Raises:
      UserError: the checkpoint cannot be loaded, or the sizes do not fit it.
    """
    tokenizer, template = load_run_tokenizer(path), load_chat_template(path)
    options = EngineOptions(
        max_rows=max_rows,
        context_tokens=context_tokens,
        page_tokens=min(64, context_tokens),
        prefill_chunk=min(256, context_tokens),
        cache_dtype=dtype,
    )
    return LocalEndpoint(load_model(path, jnp.dtype(dtype)), options, tokenizer, template)

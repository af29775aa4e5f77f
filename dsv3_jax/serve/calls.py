"""From a request of the API to requests of the engine: text to ids, defaults, limits of length."""

import secrets
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from dsv3_jax.data.chat import ChatTemplate, encode_chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.serve.openai import ApiError, ChatRequest, CompletionRequest, Generation
from dsv3_jax.serve.requests import Request, Sampling

_DEFAULT_TOKENS = 16  # of a completion; a chat may fill its context


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one request of the API asks of the engine."""

    requests: tuple[Request, ...]  # one a choice: those of the first prompt, of the second, ...
    echoes: tuple[str, ...]  # text that goes before each choice
    num_prompt_tokens: int  # each prompt once
    stops: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Makes calls for one model.

    Attributes:
      context_tokens: prompt and answer together, at most.
      vocab_size: rows of the embedding table.
      max_choices: prompts times n.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    context_tokens: int
    vocab_size: int
    max_choices: int

    @property
    def stop_ids(self) -> frozenset[int]:
        return frozenset({self.tokenizer.eos_id})

    def completion(self, body: CompletionRequest) -> Call:
        """Raises ApiError (400) for what does not fit the model."""
        self._check_choices(body, len(body.prompts))
        prompts = [self._ids(prompt) for prompt in body.prompts]
        call = self._call(body, prompts, body.max_tokens or _DEFAULT_TOKENS, "prompt")
        if not body.echo:
            return call
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p) for p in body.prompts]
        echoes = tuple(text for text in texts for _ in range(body.n))
        return Call(**vars(call) | {"echoes": echoes})

    def chat(self, body: ChatRequest) -> Call:
        """Raises ApiError (400) for what does not fit the model or its chat template."""
        self._check_choices(body, 1)
        messages = [message.for_template() for message in body.messages]
        try:
            prompt = encode_chat(self.tokenizer, self.template, messages, True)
        except UserError as error:
            raise ApiError(400, str(error), "messages") from None
        rest = max(1, self.context_tokens - len(prompt))
        max_tokens = body.max_completion_tokens or body.max_tokens or rest
        return self._call(body, [prompt], max_tokens, "messages")

    def _check_choices(self, body: Generation, num_prompts: int) -> None:
        if num_prompts * body.n > self.max_choices:
            raise ApiError(
                400,
                f"{num_prompts} prompts x n={body.n} are too many texts for one request; "
                f"this server makes up to {self.max_choices}",
                "n",
            )

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return [self.tokenizer.bos_id, *self.tokenizer.encode(prompt)]
        self._check_ids(prompt, "prompt")
        return prompt

    def _check_ids(self, ids: Sequence[int], param: str) -> None:
        if max(ids, default=0) >= self.vocab_size:
            raise ApiError(
                400,
                f"{param} holds token {max(ids)}; the vocabulary is 0..{self.vocab_size - 1}",
                param,
            )

    def _call(
        self, body: Generation, prompts: Sequence[Sequence[int]], max_tokens: int, param: str
    ) -> Call:
        longest = max(map(len, prompts))
        if longest + max_tokens > self.context_tokens:
            raise ApiError(
                400,
                f"this model's context is {self.context_tokens} tokens; {longest} of {param} and "
                f"max_tokens={max_tokens} are more together: shorten or lower one of them",
                param,
                "context_length_exceeded",
            )
        seed = secrets.randbits(31) if body.seed is None else body.seed
        bias = self._logit_bias(body)
        requests = [
            Request(
                prompt=tuple(prompt),
                max_tokens=max_tokens,
                sampling=Sampling(
                    temperature=body.temperature,
                    top_p=body.top_p,
                    top_k=body.top_k,
                    min_p=body.min_p,
                    repetition_penalty=body.repetition_penalty,
                    presence_penalty=body.presence_penalty,
                    frequency_penalty=body.frequency_penalty,
                    logit_bias=bias,
                    seed=_choice_seed(seed, number),
                ),
                stop_ids=self.stop_ids,
                num_logprobs=body.num_logprobs,
            )
            for prompt in prompts
            for number in range(body.n)
        ]
        return Call(
            requests=tuple(requests),
            echoes=("",) * len(requests),
            num_prompt_tokens=sum(map(len, prompts)),
            stops=tuple(body.stops),
        )

    def _logit_bias(self, body: Generation) -> tuple[tuple[int, float], ...]:
        for key in body.logit_bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise ApiError(
                    400, f"logit_bias has key {key[:20]!r}, not a token id", "logit_bias"
                )
        biases = {int(key): bias for key, bias in body.logit_bias.items()}
        self._check_ids(list(biases), "logit_bias")
        return tuple(sorted(biases.items()))


def _choice_seed(seed: int, number: int) -> int:
    """The first choice has the caller's own seed; the others differ from it and its neighbours'."""
    return seed if number == 0 else zlib.crc32(f"{seed} {number}".encode()) >> 1

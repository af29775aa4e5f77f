"""What goes into the engine and what comes out of it. Plain Python, for the server's threads.

A token is an int id; text is `serve/text.py`'s matter.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the logits. Each step of it is off by default."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # the smallest set of most likely tokens with this much probability
    top_k: int = 0  # the k most likely tokens; 0: all
    min_p: float = 0.0  # tokens at least this likely, as a fraction of the most likely one
    repetition_penalty: float = 1.0  # divides logits of tokens in prompt or output; 1: off
    presence_penalty: float = 0.0  # subtracted once from tokens in the output
    frequency_penalty: float = 0.0  # subtracted for each time a token is in the output
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    seed: int = 0  # the same seed gives the same text, whatever else is in the batch


@dataclass(frozen=True, kw_only=True)
class Request:
    """One text to continue."""

    prompt: tuple[int, ...]
    max_tokens: int  # new tokens at most
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()  # any of them ends the text, and is its last token
    num_logprobs: int | None = None  # alternatives to report for each token; None: no logprobs


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """log softmax(logits) of one new token and of the most likely ones, before any sampling."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # (token, logprob), most likely first


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one step of the engine added to one request."""

    request_id: int
    tokens: tuple[int, ...]  # new in this step
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a new token, if asked for
    finish_reason: str | None = None  # None: goes on; 'stop', 'length', 'cancelled', 'error'


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Fixed sizes of an engine; its two programs are compiled for them."""

    max_rows: int = 8  # requests decoded together
    context_tokens: int = 4096  # prompt and output of a request, at most
    page_tokens: int = 64  # tokens of a cache page
    num_pages: int | None = None  # in all; None: enough for max_rows full contexts
    prefill_chunk: int = 256  # prompt tokens of a request that one step takes in
    # Requests that it takes them of, on each device. An even number runs as two halves where
    # experts are on several devices: one's tokens travel while the other computes (spec §11).
    prefill_rows: int = 1
    cache_dtype: str = "bfloat16"  # 'bfloat16', 'float32', 'fp8'
    num_draft_tokens: int = 0  # MTP drafts verified a step; 0: no speculation
    max_queue: int = 256  # requests that may wait
    prefix_reuse: bool = True  # share the pages of equal prompt beginnings
    redundant_experts: int = 0  # extra physical slots for experts under load (spec §11)
    rebalance_steps: int | None = None  # steps between new placements; None: never
    # Weights of each layer in arrays of their own, which a GPU need not copy in each step; they are
    # there twice while the engine starts. None: on a GPU, unless experts move.
    layers_apart: bool | None = None


class Overloaded(Exception):
    """The queue is full: try again later."""

"""What an engine refuses, and how it says so."""

import math
from numbers import Integral, Real

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.serve.programs import MAX_LOGPROBS
from dsv3_jax.serve.requests import EngineOptions, Request, Sampling

# Name, smallest and largest value, and whether the smallest is allowed itself.
_RANGES = (
    ("temperature", 0, math.inf, True),
    ("top_p", 0, 1, False),
    ("min_p", 0, 1, True),
    ("repetition_penalty", 0, math.inf, False),
    ("presence_penalty", -math.inf, math.inf, True),
    ("frequency_penalty", -math.inf, math.inf, True),
)


def check_options(options: EngineOptions, config: ModelConfig, num_shards: int) -> None:
    """Raises UserError for sizes that no engine can have."""
    for name in ("max_rows", "context_tokens", "page_tokens", "prefill_chunk", "prefill_rows"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)} is too small; use 1 or more")
    if options.max_rows % num_shards:
        more = -(-options.max_rows // num_shards) * num_shards
        raise UserError(
            f"max_rows={options.max_rows} does not divide over the {num_shards} devices of the "
            f"mesh; use a multiple, e.g. {more}"
        )
    if options.num_pages is not None and options.num_pages < num_shards:
        raise UserError(
            f"num_pages={options.num_pages} is too small; each of {num_shards} devices needs one"
        )
    if options.cache_dtype not in ("bfloat16", "float32", "fp8"):
        raise UserError(
            f"cache_dtype={options.cache_dtype!r} is unknown; use 'bfloat16', 'float32' or 'fp8'"
        )
    if options.layers_apart and (options.redundant_experts or options.rebalance_steps):
        raise UserError("layers_apart=True keeps experts where they are; leave it at None")
    if options.num_draft_tokens < 0 or (options.num_draft_tokens and not config.mtp_depth):
        raise UserError(
            f"num_draft_tokens={options.num_draft_tokens} needs a model with an MTP module; "
            "use 0 for this one"
            if options.num_draft_tokens > 0
            else f"num_draft_tokens={options.num_draft_tokens} is negative; use 0 or more"
        )


def check_tensor(config: ModelConfig, expert: int, tensor: int, *, fp8: bool) -> None:
    """Raises UserError where heads or experts do not divide over the devices along `tensor`.

    Args:
      fp8: the weights are codes with scales of 128 x 128 blocks, which stay whole.
    """
    heads, experts = config.num_heads, config.num_experts
    if heads % tensor:
        raise UserError(f"tensor={tensor} does not divide the model's {heads} heads")
    if experts % (expert * tensor):
        raise UserError(
            f"the model's {experts} experts do not divide over expert={expert} x tensor={tensor} "
            "devices; lower either"
        )
    widths = config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim, config.v_head_dim
    if fp8 and any(heads // tensor * width % 128 for width in widths):
        raise UserError(
            f"tensor={tensor} cuts FP8 weights inside their 128 x 128 blocks; lower it, or serve "
            "in bfloat16"
        )


def check_request(request: Request, config: ModelConfig, options: EngineOptions) -> None:
    """Raises UserError for a request that this model or engine cannot serve."""
    if not request.prompt:
        raise UserError("the prompt is empty; give at least one token")
    tokens = [*request.prompt, *(token for token, _ in request.sampling.logit_bias)]
    for token in tokens:
        if not isinstance(token, Integral) or not 0 <= token < config.vocab_size:
            raise UserError(f"token {token!r} is outside the vocabulary 0..{config.vocab_size - 1}")
    if not isinstance(request.max_tokens, Integral) or request.max_tokens < 1:
        raise UserError(f"max_tokens={request.max_tokens!r} must be an integer of 1 or more")
    total = len(request.prompt) + request.max_tokens
    if total > options.context_tokens:
        raise UserError(
            f"prompt ({len(request.prompt)} tokens) and max_tokens={request.max_tokens} are "
            f"{total} together; this engine has room for {options.context_tokens}: lower either"
        )
    most = min(MAX_LOGPROBS, config.vocab_size)
    if request.num_logprobs is not None and not 0 <= request.num_logprobs <= most:
        raise UserError(f"num_logprobs={request.num_logprobs} must lie in 0..{most}")
    _check_sampling(request.sampling)


def _check_sampling(sampling: Sampling) -> None:
    for name, low, high, closed in _RANGES:
        value = getattr(sampling, name)
        number = isinstance(value, Real) and math.isfinite(value)
        if not number or not (low < value <= high or (closed and value == low)):
            above = f"{'at least' if closed else 'above'} {low}" if low > -math.inf else "finite"
            upto = f" and at most {high}" if high < math.inf else ""
            raise UserError(f"{name}={value!r} must be {above}{upto}")
    if not isinstance(sampling.top_k, Integral) or sampling.top_k < 0:
        raise UserError(f"top_k={sampling.top_k!r} must be 0 (all) or a positive integer")
    if not isinstance(sampling.seed, Integral):
        raise UserError(f"seed={sampling.seed!r} must be an integer")
    for token, value in sampling.logit_bias:
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"logit_bias of token {token} is {value!r}; it must be finite")

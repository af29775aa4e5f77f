"""Our models in EleutherAI's lm-evaluation-harness (`pip install 'dsv3-jax[eval]'`).

    import lm_eval
    from dsv3_jax.evals.lm_harness import load_harness_model

    model = load_harness_model("runs/tiny", window=2048)
    results = lm_eval.simple_evaluate(model=model, tasks=["hellaswag", "gsm8k"])

A server is reached in the same way, for tasks that generate: `HarnessModel(HttpEndpoint(url))`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Endpoint, Message, SamplingOptions
from dsv3_jax.evals.failures import Failures
from dsv3_jax.evals.local import load_endpoint
from dsv3_jax.evals.perplexity import Scorer, Window, text_windows

_BATCH = 64  # prompts between two looks at the failures


class _Conversation(str):
    """Messages, for the endpoint to lay out; as a text, what the harness logs and caches by."""

    messages: Sequence[Message]


class HarnessModel(TemplateLM):
    """An endpoint that generates and, for tasks that compare probabilities, a scorer.

    Attributes:
      failures: generations that did not come, by reason; their text is empty.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        scorer: Scorer | None = None,
        tokenizer: Tokenizer | None = None,
        *,
        max_tokens: int = 256,
        max_failures: int = 20,
    ):
        """Args:
        scorer, tokenizer: of the same model; None where no log probabilities are asked for.
        max_tokens: of a generation, where the task does not say.
        max_failures: more of them raise UserError.
        """
        super().__init__()
        self._endpoint, self._scorer, self._our_tokenizer = endpoint, scorer, tokenizer
        self._max_tokens = max_tokens
        self.failures = Failures(
            "lm-evaluation-harness", max_failures, "check the endpoint, or raise max_failures"
        )

    @property
    def eot_token_id(self) -> int:
        return self._need_scorer()[1].eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is conditioned on."""
        return self._need_scorer()[1].bos_id

    @property
    def tokenizer_name(self) -> str:
        """The harness keys its caches of requests by it."""
        return self._our_tokenizer.sha256 if self._our_tokenizer else "endpoint"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Plain text: `_loglikelihood_tokens` puts the beginning-of-sentence token before it."""
        return self._need_scorer()[1].encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        conversation = _Conversation(
            "\n\n".join(f"{message['role']}: {message['content']}" for message in chat_history)
        )
        conversation.messages = chat_history
        return conversation

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        scorer, tokenizer = self._need_scorer()
        windows = []
        for _, context, continuation in requests:
            if len(continuation) > scorer.window:
                raise UserError(
                    f"an answer of {len(continuation)} tokens does not fit window={scorer.window}; "
                    "raise window"
                )
            before = context if context[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *context]
            ids = [*before, *continuation][-scorer.window - 1 :]
            windows.append(Window(ids, len(ids) - len(continuation)))
        return [(score.logprob, score.greedy) for score in scorer.score(windows)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        scorer, tokenizer = self._need_scorer()
        sums = []
        for request in requests:
            ids = [tokenizer.bos_id, *tokenizer.encode(request.args[0])]
            windows = text_windows(ids, scorer.window, max(1, scorer.window // 2))
            sums.append(sum(score.logprob for score in scorer.score(windows)))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        groups: dict[SamplingOptions, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(self._options(request.args[1]), []).append(index)
        for options, indices in groups.items():
            for start in range(0, len(indices), _BATCH):
                batch = indices[start : start + _BATCH]
                prompts = [requests[index].args[0] for index in batch]
                prompts = [getattr(prompt, "messages", prompt) for prompt in prompts]
                answers = self._endpoint.complete(prompts, options)
                for index, answer in zip(batch, answers, strict=True):
                    if answer.error is not None:
                        self.failures.add(answer.error)
                    texts[index] = answer.text
        return texts

    def _options(self, settings: Mapping[str, Any]) -> SamplingOptions:
        until = settings.get("until") or ()
        sampled = settings.get("do_sample", "temperature" in settings)
        return SamplingOptions(
            max_tokens=settings.get("max_gen_toks", self._max_tokens),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_p=float(settings.get("top_p", 1.0)),
            stop=(until,) if isinstance(until, str) else tuple(text for text in until if text),
            seed=0,
        )

    def _need_scorer(self) -> tuple[Scorer, Tokenizer]:
        if self._scorer is None or self._our_tokenizer is None:
            raise UserError(
                "this task compares probabilities, which an endpoint does not tell; give a "
                "checkpoint: load_harness_model(DIR)"
            )
        return self._scorer, self._our_tokenizer


def load_harness_model(
    path: str | Path, *, window: int = 2048, rows: int = 4, dtype: str = "float32"
) -> HarnessModel:
    """A Hugging Face folder or a run of ours, for every kind of task.

    Args:
      window: tokens that a pass sees, and of a prompt with its generation.
      rows: texts a pass.
      dtype: 'float32' or 'bfloat16'.

    Raises:
      UserError: the checkpoint cannot be loaded.
    """
    endpoint = load_endpoint(path, dtype=dtype, context_tokens=window, max_rows=rows)
    scorer = Scorer(endpoint.model, window, rows)
    return HarnessModel(endpoint, scorer, endpoint.tokenizer)

"""Scores of the DeepSeek-V3 report for the benchmarks that can be run here (spec §12), percent."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of the report's tables.

    Attributes:
      benchmark: its name there, where it is not the same problems: then scores are no target.
      shots: None: not told.
    """

    scores: dict[str, float]
    shots: int | None = None
    benchmark: str | None = None


# Table 3, pre-trained models. MMLU-Pro was scored by perplexity there, the others by generation.
BASE = {
    "gsm8k": Published(scores={"V3": 89.3, "V2": 81.6}, shots=8),
    "math500": Published(scores={"V3": 61.6, "V2": 43.4}, shots=4, benchmark="MATH, all of it"),
    "mmlu_pro": Published(scores={"V3": 64.4, "V2": 51.4}, shots=5),
    "humaneval": Published(scores={"V3": 65.2, "V2": 43.3}, shots=0),
}

_CHAT_MODELS = ("V3", "V2.5", "GPT-4o", "Claude-3.5")
_CHAT_SCORES = {
    "math500": (90.2, 74.7, 74.6, 78.3),
    "mmlu_pro": (75.9, 66.2, 72.6, 78.0),
    "gpqa_diamond": (59.1, 41.3, 49.9, 65.0),
    "humaneval": (82.6, 77.4, 80.5, 81.7),
}
_OTHER_BENCHMARK = {"humaneval": "HumanEval-Mul, eight languages"}

# Table 6, chat models.
CHAT = {
    name: Published(
        scores=dict(zip(_CHAT_MODELS, scores, strict=True)), benchmark=_OTHER_BENCHMARK.get(name)
    )
    for name, scores in _CHAT_SCORES.items()
}

# Table 3: bits per byte of the Pile's test set.
BITS_PER_BYTE = {"V3": 0.548, "V2": 0.606}

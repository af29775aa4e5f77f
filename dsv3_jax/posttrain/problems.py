"""Problems whose answers can be checked: what GRPO samples answers to (spec §10.2).

Built in is arithmetic. A JSONL file has an object a line: {"prompt": text or messages, "answer":
what the reward compares with}; for the reward 'code', "answer" is what `rewards.CodeTests` takes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3_jax.config import Config
from dsv3_jax.data.chat import ChatTemplate, encode_chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.answers import same_answer
from dsv3_jax.evals.failures import Failures
from dsv3_jax.posttrain.records import read_lines
from dsv3_jax.posttrain.rewards import BoxedAnswer, CodeTests, Format, Reward, Weighted

ARITHMETIC = "arithmetic"
LARGEST_OPERAND = 9


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A conversation that asks for an answer.

    Attributes:
      ids: the conversation's tokens, up to where the answer begins.
      reference: what the reward compares the answer with.
    """

    messages: tuple[Mapping[str, Any], ...]
    ids: tuple[int, ...]
    reference: Any


@dataclass(frozen=True, kw_only=True)
class Problems:
    """Those to learn from and those held out, in a random order."""

    train: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    failures: str  # records left out, by reason; '' when there are none

    def __str__(self) -> str:
        left_out = f"; left out: {self.failures}" if self.failures else ""
        return f"{len(self.train):,} problems, {len(self.held_out):,} held out{left_out}"

    def batch(self, first: int, count: int, seed: int) -> list[Problem]:
        """Numbers `first` to `first + count` of an endless order, anew permuted each round."""
        size = len(self.train)
        rounds = range(first // size, (first + count - 1) // size + 1)
        order = np.concatenate(
            [np.random.default_rng([seed, number]).permutation(size) for number in rounds]
        )
        start = first - rounds.start * size
        return [self.train[i] for i in order[start : start + count]]


class ExactAnswer:
    """1 for an answer that is the reference and nothing else, as a number or as written; else 0."""

    def __call__(self, prompt: Any, answer: str, reference: Any) -> float:
        return float(same_answer(answer.strip(), str(reference)))


REWARDS: dict[str, Callable[[], Reward]] = {
    "exact": ExactAnswer,
    "boxed": BoxedAnswer,
    # Accuracy and format with equal weights (R1, spec §10.3).
    "boxed_and_format": lambda: Weighted((0.5, BoxedAnswer()), (0.5, Format())),
    "code": CodeTests,
}


def arithmetic_records() -> list[dict[str, Any]]:
    """Every sum and difference of two digits: 200 records as of a JSONL file."""
    operands = range(LARGEST_OPERAND + 1)
    return [
        {"prompt": f"{a}{sign}{b}=", "answer": str(a + b if sign == "+" else a - b)}
        for sign in "+-"
        for a in operands
        for b in operands
    ]


def load_problems(config: Config, tokenizer: Tokenizer, template: ChatTemplate) -> Problems:
    """The problems of `grpo.problems`, at most a quarter of them held out.

    Raises:
      UserError: the file cannot be read, more than 1 % of its records cannot be used, or none can.
    """
    name = config.grpo.problems
    if name == ARITHMETIC:
        lines = [json.dumps(record) for record in arithmetic_records()]
    else:
        lines = read_lines("grpo.problems", name)
    failures = Failures(
        f"grpo.problems={name}", len(lines) // 100, "mend the file: each line needs what is missing"
    )
    room = config.data.sequence_length + 1 - config.grpo.max_answer_tokens
    problems = []
    for line in lines:
        problem = _read(line, tokenizer, template, room)
        if isinstance(problem, str):
            failures.add(problem)
        else:
            problems.append(problem)
    if not problems:
        raise UserError(f"grpo.problems={name} holds no problem; give a JSONL file with some")
    order = np.random.default_rng(config.run.seed).permutation(len(problems))
    shuffled = [problems[i] for i in order]
    held_out = min(config.data.validation_documents, len(shuffled) // 4)
    return Problems(
        train=tuple(shuffled[held_out:]),
        held_out=tuple(shuffled[:held_out]),
        failures=str(failures),
    )


def _read(line: str, tokenizer: Tokenizer, template: ChatTemplate, room: int) -> Problem | str:
    """The problem of a line, or why there is none."""
    try:
        record = json.loads(line)
        prompt, reference = record["prompt"], record["answer"]
    except (ValueError, TypeError, RecursionError):
        return "not a JSON object"
    except KeyError as error:
        return f"no {error.args[0]}"
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        ids = encode_chat(tokenizer, template, messages, add_generation_prompt=True)
    except (UserError, TypeError, AttributeError):
        return "prompt is not a conversation"
    if len(ids) > room:
        return "prompt too long"
    return Problem(messages=tuple(messages), ids=tuple(ids), reference=reference)

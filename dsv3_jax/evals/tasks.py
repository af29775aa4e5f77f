"""Benchmarks read from the files they are published as, asked and marked.

A `Task` turns a file into items, an item into a prompt, and a model's text into right or wrong.
All are scored by generation. Prompts and extraction of the report are not published (spec §13);
ours are in this file, whole.
"""

import csv
import gzip
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.evals import answers
from dsv3_jax.evals.endpoint import Prompt
from dsv3_jax.evals.math_equal import MathVerifier, is_installed
from dsv3_jax.posttrain.sandbox import passes_tests

LETTERS = "ABCDEFGHIJ"
_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclass(frozen=True, kw_only=True)
class Item:
    """One problem."""

    question: str
    solution: str  # as an example shows it, reasoning included where it is published
    reference: str  # what an answer is compared with
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One benchmark.

    Attributes:
      read: one record of the file -> an item; raises KeyError, ValueError or TypeError.
      is_right: (item, text of the model) -> bool; may raise or time out.
      shots: examples before each question of a base model; chats have none.
      question, answer: how a base model's prompt names them.
      instruction: appended to a question in a chat.
      stop: what ends a base model's text.
    """

    title: str
    read: Callable[[dict[str, Any]], Item]
    is_right: Callable[[Item, str], bool]
    shots: int
    max_tokens: int
    question: str = "Question: "
    answer: str = "\nAnswer:"
    instruction: str = "\n" + _BOXED
    stop: tuple[str, ...] = ("\nQuestion:",)
    same_subject: bool = False  # examples are of the item's own `details["category"]`

    def items(self, path: str | Path) -> list[Item]:
        """Reads a file: .jsonl, .json, .csv or .parquet, any of the first three also gzipped.

        Raises:
          UserError: it cannot be read, or a record is not one of this benchmark.
        """
        items = []
        for number, record in enumerate(_records(Path(path).expanduser()), start=1):
            try:
                items.append(self.read(record))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(
                    f"{path}: record {number} is not one of {self.title} ({what}); give the file "
                    "as it is published"
                ) from error
        if not items:
            raise UserError(f"{path} holds no records; give the file of {self.title}")
        return items

    def prompt(self, item: Item, examples: Sequence[Item], chat: bool) -> Prompt:
        """What the model is asked: a conversation, or a text to continue after examples."""
        if chat:
            return [{"role": "user", "content": item.question + self.instruction}]
        shown = [
            f"{self.question}{example.question}{self.answer} {example.solution}\n\n"
            for example in examples
        ]
        return "".join(shown) + self.question + item.question + self.answer

    def examples(self, item: Item, pool: Sequence[Item], shots: int) -> list[Item]:
        """The first `shots` of the pool, of the item's subject where the benchmark does so.

        Raises:
          UserError: the pool has fewer.
        """
        subject = item.details.get("category")
        usable = [
            example
            for example in pool
            if example.question != item.question
            and not (self.same_subject and example.details.get("category") != subject)
        ]
        if len(usable) < shots:
            of = f" of {subject!r}" if self.same_subject else ""
            raise UserError(
                f"{self.title}: {len(usable)} examples{of} for {shots} shots; give more with "
                "--examples=TASK=FILE, or --shots=0"
            )
        return usable[:shots]


def _records(path: Path) -> Iterable[dict[str, Any]]:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:] or [""]
    try:
        if kind == [".parquet"]:
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        opener = gzip.open if zipped else open
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            if kind == [".csv"]:
                return list(csv.DictReader(file))
            if kind == [".json"]:
                return json.load(file)
            if kind == [".jsonl"]:
                return [json.loads(line) for line in file if line.strip()]
    except (OSError, EOFError, ValueError) as error:  # pyarrow's errors are ValueErrors or OSErrors
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read ({reason}); give a benchmark's file") from error
    raise UserError(f"{path} is of no known kind; give .jsonl, .json, .csv (or .gz) or .parquet")


def _gsm8k(record: dict[str, Any]) -> Item:
    reasoning, _, reference = record["answer"].partition("####")
    if not reference.strip():
        raise ValueError("its answer has no ####")
    return Item(question=record["question"], solution=record["answer"], reference=reference.strip())


def _same_number(item: Item, text: str) -> bool:
    found, wanted = answers.final_number(text), answers.as_number(item.reference)
    return found is not None and wanted is not None and answers.as_number(found) == wanted


def _math(record: dict[str, Any]) -> Item:
    reference = record.get("answer") or answers.last_boxed(record["solution"])
    if reference is None:
        raise ValueError("its solution boxes no answer")
    return Item(
        question=record["problem"],
        solution=record["solution"],
        reference=str(reference),
        details={"category": record.get("subject") or record.get("type")},
    )


_verifier = MathVerifier()


def boxed_is_right(item: Item, text: str) -> bool:
    """Whether the boxed answer equals the reference: as written, or through math-verify.

    Raises:
      TimeoutError, RuntimeError: the library does not tell.
    """
    found = answers.last_boxed(text)
    if found is None:
        return False
    if answers.same_answer(found, item.reference):
        return True
    return is_installed() and _verifier.equal(found, item.reference)


def _choices(options: Sequence[str]) -> str:
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options))  # noqa: B905


def _mmlu_pro(record: dict[str, Any]) -> Item:
    options = [option for option in record["options"] if option != "N/A"]
    reference = record["answer"]
    if reference not in LETTERS[: len(options)] or len(reference) != 1:
        raise ValueError(f"its answer {reference!r} is none of its {len(options)} options")
    reasoning = (record.get("cot_content") or "").removeprefix("A: ")
    return Item(
        question=record["question"] + _choices(options),
        solution=reasoning or f"The answer is ({reference}).",
        reference=reference,
        details={"category": record["category"], "letters": LETTERS[: len(options)]},
    )


def _gpqa(record: dict[str, Any]) -> Item:
    right = record["Correct Answer"].strip()
    options = [right, *(record[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
    question = record["Question"].strip()
    # The file lists the right one first. The order hangs on the question alone: every run has it.
    random.Random(question).shuffle(options)
    reference = LETTERS[options.index(right)]
    return Item(
        question=question + _choices(options),
        solution=f"The answer is ({reference}).",
        reference=reference,
        details={"letters": LETTERS[:4]},
    )


def _same_letter(item: Item, text: str) -> bool:
    return answers.final_letter(text, item.details["letters"]) == item.reference


def _humaneval(record: dict[str, Any]) -> Item:
    details = {key: record[key] for key in ("prompt", "test", "entry_point", "task_id")}
    return Item(
        question=record["prompt"],
        solution=record["canonical_solution"],
        reference=record["canonical_solution"],
        details=details,
    )


def _passes(item: Item, text: str) -> bool:
    details = item.details
    code = answers.code_block(text)
    # A base model continues the prompt; a chat model repeats it, or gives the function's body.
    program = details["prompt"] + (text if code is None else f"\n{code}")
    tests = f"{details['test']}\ncheck({details['entry_point']})\n"
    return passes_tests(program, tests)


def _problem(record: dict[str, Any]) -> Item:
    if not isinstance(record["prompt"], str):
        raise ValueError("its prompt is not text")
    answer = str(record["answer"])
    return Item(question=record["prompt"], solution=answer, reference=answer)


def _same(item: Item, text: str) -> bool:
    return answers.same_answer(text.strip(), item.reference)


TASKS = {
    "gsm8k": Task(title="GSM8K", read=_gsm8k, is_right=_same_number, shots=8, max_tokens=512),
    "math500": Task(
        title="MATH-500",
        read=_math,
        is_right=boxed_is_right,
        shots=4,
        max_tokens=2048,
        question="Problem: ",
        answer="\nSolution:",
        stop=("\nProblem:",),
    ),
    "mmlu_pro": Task(
        title="MMLU-Pro",
        read=_mmlu_pro,
        is_right=_same_letter,
        shots=5,
        max_tokens=1024,
        instruction='\nThink step by step, then end with "The answer is (X)", X being a letter.',
        same_subject=True,
    ),
    "gpqa_diamond": Task(
        title="GPQA-Diamond",
        read=_gpqa,
        is_right=_same_letter,
        shots=0,
        max_tokens=2048,
        instruction='\nThink step by step, then end with "The answer is (X)", X being a letter.',
    ),
    "humaneval": Task(
        title="HumanEval",
        read=_humaneval,
        is_right=_passes,
        shots=0,
        max_tokens=768,
        question="",
        answer="",
        instruction="\nWrite the whole function, in one block of Python code.",
        stop=("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@"),
    ),
    # One's own, as GRPO and distillation read them: {"prompt": text, "answer": ...}.
    "problems": Task(
        title="problems",
        read=_problem,
        is_right=_same,
        shots=0,
        max_tokens=256,
        question="",
        answer="",
        instruction="",
        stop=("\n",),
    ),
}

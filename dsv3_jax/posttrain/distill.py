"""Distillation of a reasoning teacher (spec §10.1, §10.4): its verified answers, as records.

For each problem the teacher answers under a system prompt that asks for reflection and
verification. A reward verifies the answers; of the right, short and readable ones the shortest is
kept (rejection sampling). A problem then gives two records for fine-tuning: <problem, original
response>, where it has one, and <system prompt, problem, response of the teacher>.

Answers are appended to a file as they come, so that a run goes on where it was stopped.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Endpoint, Message, SamplingOptions
from dsv3_jax.evals.failures import Failures
from dsv3_jax.posttrain.rewards import Reward, Sample, score_all

SYSTEM = (
    "Think before you answer: reason step by step, reflect on each step, look for mistakes, try "
    "another way where one does not lead on, and verify the result. Then give the answer."
)
ANSWERS_FILE = "answers.jsonl"  # of the teacher, all of them, with what became of them
RECORDS_FILE = "records.jsonl"  # for experiments.sft
_BATCH = 64  # problems asked together; as many are lost when the run is killed


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """What is asked and what is kept.

    Attributes:
      samples: answers to each problem.
      max_tokens, temperature: of an answer.
      min_reward: from which an answer counts as right.
      max_characters: a longer answer is thrown away.
      max_failed_fraction: of the answers that may fail to come; more stop the run.
    """

    samples: int = 4
    max_tokens: int = 1024
    temperature: float = 0.7
    min_reward: float = 1.0
    max_characters: int = 20_000
    max_failed_fraction: float = 0.1
    system: str = SYSTEM
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Question:
    """A problem with a checkable answer; `response`: an original one, where there is one."""

    prompt: str | tuple[Message, ...]
    reference: Any
    response: str | None = None

    @property
    def messages(self) -> list[Message]:
        if isinstance(self.prompt, str):
            return [{"role": "user", "content": self.prompt}]
        return list(self.prompt)


@dataclass
class Distilled:
    """What came of a run: problems, records written, and answers thrown away, by reason."""

    problems: int = 0
    solved: int = 0
    records: int = 0
    rejected: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason} {n:,}" for reason, n in self.rejected.most_common())
        return (
            f"{self.solved:,} of {self.problems:,} problems solved, {self.records:,} records; "
            f"answers rejected: {reasons or 'none'}"
        )


def read_questions(lines: Sequence[str], failures: Failures) -> list[Question]:
    """{"prompt": text or messages, "answer": ..., "response": optional text} a line.

    Raises:
      UserError: more lines than accepted cannot be used.
    """
    questions = []
    for line in lines:
        try:
            record = json.loads(line)
            prompt, reference = record["prompt"], record["answer"]
        except (ValueError, TypeError, RecursionError):
            failures.add("not a JSON object")
            continue
        except KeyError as error:
            failures.add(f"no {error.args[0]}")
            continue
        response = record.get("response")
        if not isinstance(prompt, str):
            if not isinstance(prompt, list) or not all(isinstance(m, Mapping) for m in prompt):
                failures.add("prompt is not a conversation")
                continue
            prompt = tuple(prompt)
        if response is not None and not isinstance(response, str):
            failures.add("response is not text")
            continue
        questions.append(Question(prompt=prompt, reference=reference, response=response))
    return questions


def distill(
    questions: Sequence[Question],
    teacher: Endpoint,
    reward: Reward,
    folder: Path,
    options: DistillOptions,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Distilled:
    """Asks, verifies and selects; writes `ANSWERS_FILE` and `RECORDS_FILE` into `folder`.

    Problems that the answers' file already has are not asked again.

    Raises:
      UserError: the file is of other problems or options, too many answers failed to come, or the
        reward failed too often.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS_FILE
    asked = {entry["problem"]: entry for entry in _read_answers(path, questions, options)}
    failures = Failures(
        "answers of the teacher",
        int(options.max_failed_fraction * len(questions) * options.samples),
        f"check the teacher; the same command goes on after the {len(asked):,} problems in {path}",
    )
    waiting = [number for number in range(len(questions)) if number not in asked]
    with path.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), _BATCH):
            batch = waiting[start : start + _BATCH]
            for entry in _ask(batch, questions, teacher, reward, options, failures):
                asked[entry["problem"]] = entry
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            progress(len(asked), len(questions))
    return _write_records(folder / RECORDS_FILE, questions, asked, options)


def _ask(
    batch: Sequence[int],
    questions: Sequence[Question],
    teacher: Endpoint,
    reward: Reward,
    options: DistillOptions,
    failures: Failures,
) -> Iterator[dict[str, Any]]:
    """Yields an entry of the answers' file for each problem of the batch."""
    jobs = [number for number in batch for _ in range(options.samples)]
    system = {"role": "system", "content": options.system}
    answers = teacher.complete(
        [[system, *questions[number].messages] for number in jobs],
        SamplingOptions(
            max_tokens=options.max_tokens,
            temperature=options.temperature,
            seed=(options.seed + batch[0] * options.samples) % 2**31,
        ),
    )
    verdicts: list[str | None] = []
    for answer in answers:
        if answer.error is not None:
            failures.add(answer.error)
        verdicts.append(_verdict(answer.text, answer.finish_reason, answer.error, options))
    open_jobs = [i for i, verdict in enumerate(verdicts) if verdict is None]
    samples = [
        Sample(questions[jobs[i]].messages, answers[i].text, questions[jobs[i]].reference)
        for i in open_jobs
    ]
    if samples:
        scores = score_all(reward, samples)
        for i, value, valid in zip(open_jobs, scores.values_N, scores.valid_N, strict=True):
            if not valid:
                verdicts[i] = "verification failed"
            elif value < options.min_reward:
                verdicts[i] = "wrong"
    for place, number in enumerate(batch):
        own = range(place * options.samples, (place + 1) * options.samples)
        yield {
            "problem": number,
            "question": questions[number].prompt,
            "answers": [{"text": answers[i].text, "rejected": verdicts[i]} for i in own],
        }


def _verdict(
    text: str, finish_reason: str | None, error: str | None, options: DistillOptions
) -> str | None:
    """Why an answer is thrown away before it is verified; None if it is not."""
    if error is not None:
        return f"failed: {error}"
    if finish_reason == "length":
        return "cut off"
    if len(text) > options.max_characters:
        return "too long"
    if not text.strip():
        return "empty"
    return None if is_readable(text) else "unreadable"


def is_readable(text: str) -> bool:
    """No control or unknown characters, no line over and over, one script for its letters.

    R1's answers mixed languages (spec §10.3): letters of a second script may be a tenth at most.
    """
    if any(unicodedata.category(c) in ("Cc", "Cn", "Co") and c not in "\n\t\r" for c in text):
        return False
    if "\N{REPLACEMENT CHARACTER}" in text:
        return False
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) >= 8 and Counter(lines).most_common(1)[0][1] > len(lines) / 2:
        return False
    # Commands of TeX, variables and Greek letters belong to no language.
    prose = re.sub(r"\\[a-zA-Z]+|\b[a-zA-Z]\b", " ", text)
    scripts = Counter(unicodedata.name(c, "?").split()[0] for c in prose if c.isalpha())
    scripts.pop("GREEK", None)
    return not scripts or scripts.most_common(1)[0][1] >= 0.9 * scripts.total()


def _read_answers(
    path: Path, questions: Sequence[Question], options: DistillOptions
) -> Iterator[dict[str, Any]]:
    """Entries of an earlier run; a last line that a kill cut short is taken off the file."""
    if not path.exists():
        return
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    text = whole.decode("utf-8") + "\n" if whole else ""
    path.write_text(text, encoding="utf-8")
    for line in text.split("\n")[:-1]:
        entry = json.loads(line)
        number = entry["problem"]
        prompt = questions[number].prompt if number < len(questions) else None
        same = json.loads(json.dumps(prompt)) == entry["question"]
        if not same or len(entry["answers"]) != options.samples:
            raise UserError(
                f"{path} holds answers to other problems or another number of samples; give "
                f"another --workdir"
            )
        yield entry


def _write_records(
    path: Path,
    questions: Sequence[Question],
    asked: Mapping[int, Mapping[str, Any]],
    options: DistillOptions,
) -> Distilled:
    """Writes the two kinds of records, and counts."""
    result = Distilled(problems=len(questions))
    records = []
    for number, question in enumerate(questions):
        answers = asked[number]["answers"]
        result.rejected.update(a["rejected"] for a in answers if a["rejected"] is not None)
        right = [a["text"] for a in answers if a["rejected"] is None]
        result.solved += bool(right)
        result.rejected["longer than another"] += max(0, len(right) - 1)
        if question.response is not None:
            records.append(_record(question.messages, question.response))
        if right:
            system = {"role": "system", "content": options.system}
            records.append(_record([system, *question.messages], min(right, key=len)))
    result.rejected = +result.rejected
    result.records = len(records)
    written = path.with_suffix(".tmp")
    written.write_text("".join(records), encoding="utf-8")
    written.replace(path)
    return result


def _record(messages: Sequence[Message], answer: str) -> str:
    conversation = [*messages, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": conversation}, ensure_ascii=False) + "\n"

"""Distillation from teachers whose answers are known: what is kept, counted, and asked again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hurry import COMMAND_FLAGS

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Answer
from dsv3_jax.evals.failures import Failures
from dsv3_jax.posttrain.conversations import read_samples
from dsv3_jax.posttrain.distill import (
    ANSWERS_FILE,
    RECORDS_FILE,
    SYSTEM,
    DistillOptions,
    Question,
    distill,
    is_readable,
    read_questions,
)
from dsv3_jax.posttrain.rewards import BoxedAnswer

ROOT = Path(__file__).parents[2]
LONG = "so " * 40 + r"it is \boxed{4}"
SHORT = r"2+2 is 4, \boxed{4}"


class Teacher:
    """Answers the n-th sample of a problem with the n-th of its answers."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def complete(self, prompts, options):
        assert options.temperature > 0
        given = []
        for prompt in prompts:
            assert prompt[0] == {"role": "system", "content": SYSTEM}
            question = prompt[-1]["content"]
            number = self.asked.count(question) % len(self.answers[question])
            self.asked.append(question)
            answer = self.answers[question][number]
            given.append(answer if isinstance(answer, Answer) else stopped(answer))
        return given


def stopped(text):
    return Answer(text=text, finish_reason="stop")


QUESTIONS = [
    Question(prompt="2+2", reference="4", response="4, of course"),
    Question(prompt="1+1", reference="2"),
    Question(prompt="3+3", reference="6"),
]
ANSWERS = {
    "2+2": [LONG, SHORT, r"\boxed{5}", Answer(error="timeout")],
    "1+1": [r"The answer is это так было \boxed{2}", "", r"\boxed{2}" + "x" * 500, r"\boxed{3}"],
    "3+3": [Answer(text=r"\boxed{6", finish_reason="length"), r"\boxed{6}", "6", "\x00\\boxed{6}"],
}
OPTIONS = DistillOptions(max_characters=400, max_failed_fraction=0.2)


def test_right_short_and_readable_answers_are_kept_and_all_others_counted(tmp_path):
    teacher = Teacher(ANSWERS)
    result = distill(QUESTIONS, teacher, BoxedAnswer(), tmp_path, OPTIONS)
    records = [json.loads(line) for line in (tmp_path / RECORDS_FILE).read_text().splitlines()]
    system = {"role": "system", "content": SYSTEM}
    assert records == [
        {"messages": [user("2+2"), assistant("4, of course")]},
        {"messages": [system, user("2+2"), assistant(SHORT)]},
        {"messages": [system, user("3+3"), assistant(r"\boxed{6}")]},
    ]
    assert (result.problems, result.solved, result.records) == (3, 2, 3)
    assert result.rejected == {
        "longer than another": 1, "wrong": 3, "failed: timeout": 1, "unreadable": 2, "empty": 1,
        "too long": 1, "cut off": 1,
    }  # fmt: skip
    assert result.rejected.total() + 2 == len(teacher.asked) == 12
    assert "2 of 3 problems solved, 3 records; answers rejected: wrong 3" in str(result)

    tokenizer = train_tokenizer(["2+2 is 4, of course 1 3 6 boxed\n"], 300)
    lines = (tmp_path / RECORDS_FILE).read_text().splitlines()
    limits = dict(max_tokens=2000, failures=Failures("records", 0, ""))
    assert len(read_samples(lines, tokenizer, ChatTemplate(), **limits)) == 3


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_a_stopped_run_goes_on_and_asks_nothing_twice(tmp_path):
    whole = distill(QUESTIONS, Teacher(ANSWERS), BoxedAnswer(), tmp_path / "whole", OPTIONS)
    part = tmp_path / "part"
    distill(QUESTIONS[:2], Teacher(ANSWERS), BoxedAnswer(), part, OPTIONS)
    with (part / ANSWERS_FILE).open("a") as file:
        file.write('{"problem": 2, "ques')  # killed while writing
    teacher = Teacher(ANSWERS)
    assert distill(QUESTIONS, teacher, BoxedAnswer(), part, OPTIONS) == whole
    assert set(teacher.asked) == {"3+3"}
    for name in (RECORDS_FILE, ANSWERS_FILE):
        assert (part / name).read_text() == (tmp_path / "whole" / name).read_text()
    teacher = Teacher(ANSWERS)
    assert distill(QUESTIONS, teacher, BoxedAnswer(), part, OPTIONS) == whole
    assert not teacher.asked
    with pytest.raises(UserError, match="answers to other problems"):
        distill(QUESTIONS[::-1], teacher, BoxedAnswer(), part, OPTIONS)


def test_a_teacher_that_fails_too_often_stops_the_run(tmp_path):
    teacher = Teacher({"q": [Answer(error="timeout")]})
    questions = [Question(prompt="q", reference="1")] * 5
    with pytest.raises(UserError, match="answers of the teacher: 5 failed .timeout 5., more than"):
        distill(questions, teacher, BoxedAnswer(), tmp_path, OPTIONS)


def test_a_reward_that_raises_is_counted_and_bounded(tmp_path):
    def broken(prompt, answer, reference):
        raise ZeroDivisionError

    teacher = Teacher({"q": [SHORT]})
    with pytest.raises(UserError, match="rewards of .* answers: .* failed .ZeroDivisionError"):
        distill([Question(prompt="q", reference="4")], teacher, broken, tmp_path, OPTIONS)


@pytest.mark.parametrize(
    ("text", "readable"),
    [
        ("Let x be 3.\nThen x + 1 = 4, so the answer is \\boxed{4}.", True),
        ("α + β = γ, and so the angle is known", True),
        ("设 x 等于三", True),
        ("Let x be 3, 设 x 等于三, 那么答案就是四", False),
        ("a\x07b", False),
        ("broken \N{REPLACEMENT CHARACTER}", False),
        ("wait\n" * 20 + "done", False),
        ("1 + 1 = 2", True),
    ],
)
def test_readable(text, readable):
    assert is_readable(text) == readable


def test_lines_that_hold_no_question():
    failures = Failures("problems", 10, "")
    lines = [
        '{"prompt": "1+1", "answer": "2"}',
        '{"prompt": [{"role": "user", "content": "1"}], "answer": 1, "response": "x"}',
        "[]", "{", '{"prompt": "x"}', '{"prompt": 3, "answer": 1}',
        '{"prompt": "x", "answer": 1, "response": 2}',
    ]  # fmt: skip
    assert len(read_questions(lines, failures)) == 2
    assert failures.counts == {
        "not a JSON object": 2, "no answer": 1, "prompt is not a conversation": 1,
        "response is not text": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problems=none.jsonl", "--endpoint=http://localhost:1/v1"], "names no file"),
        (["--problems=p.jsonl"], "either --checkpoint=DIR or --endpoint=URL"),
        (["--problems=p.jsonl", "--checkpoint=x", "--reward=bxed"], "did you mean 'boxed'"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": COMMAND_FLAGS}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.distill", *arguments],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, **flags},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr

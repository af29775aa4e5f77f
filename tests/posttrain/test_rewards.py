"""Rewards by rule, by tests and by a judge; and what `score_all` makes of those that fail."""

import re
import sys
import time

import numpy as np
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import Answer, SamplingOptions
from dsv3_jax.evals.math_equal import is_installed
from dsv3_jax.posttrain.rewards import (
    BoxedAnswer,
    CodeTests,
    Format,
    ModelJudge,
    NoVerdict,
    Sample,
    Weighted,
    score_all,
)
from dsv3_jax.posttrain.sandbox import Limits

needs_math_verify = pytest.mark.skipif(not is_installed(), reason="needs math-verify")


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        (r"So \boxed{42}.", "42", 1),
        (r"First \boxed{41}, no: \boxed{42}", 42, 1),
        (r"\boxed{41}", "42", 0),
        ("42", "42", 0),
        (r"\boxed{1{,}234}", "1234", 0),  # LaTeX's thousands; math-verify reads them
        (r"\boxed{$1,234.50}", "1234.5", 1),
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})", 1),
        (r"\boxed{\text{(B)}}", "B", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{x", "x", 0),
    ],
)
def test_boxed_answers_by_rule(answer, reference, expected, monkeypatch):
    monkeypatch.setattr("dsv3_jax.posttrain.rewards.is_installed", lambda: False)
    assert BoxedAnswer()("", answer, reference) == expected


@needs_math_verify
def test_boxed_answers_through_math_verify():
    reward = BoxedAnswer(seconds=20.0)
    assert reward("", r"\boxed{(x+1)^2}", "x^2+2x+1") == 1
    assert reward("", r"\boxed{\{2, 1\}}", r"\{1,2\}") == 1
    assert reward("", r"\boxed{x+1}", "x+2") == 0


@needs_math_verify
def test_an_answer_that_computes_for_ever_is_ended():
    reward = BoxedAnswer(seconds=2.0)
    reward("", r"\boxed{x}", "y")  # starts the worker
    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        reward("", r"\boxed{9^{9^{9^9}}}", "3")
    assert time.monotonic() - begin < 10
    assert reward("", r"\boxed{2x}", "x+x") == 1, "the next answer is judged again"


def test_format():
    reward = Format()
    assert reward("", "<think>\n1 + 1\n</think>\n2", None) == 1
    assert reward("", "<think></think>2", None) == 0
    assert reward("", "<think>1 + 1</think>", None) == 0
    assert reward("", "2", None) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_code_by_its_tests():
    reward = CodeTests(Limits(wall_seconds=2.0))
    right = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    tests = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
    assert reward("", right, tests) == 1
    assert reward("", right.replace("+", "-"), tests) == 0
    assert reward("", "no code", tests) == 0
    for cheat in ("import sys; sys.exit(0)", "import os; os._exit(0)", "while True: pass"):
        assert reward("", f"```python\n{cheat}\n```", tests) == 0
    pairs = [{"input": "1 2", "output": "3"}, {"input": "5 5", "output": "10\n"}]
    reads = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
    assert reward("", reads, pairs) == 1
    assert reward("", reads.replace("a + b", "3"), pairs) == 0.5


class Judge:
    """An endpoint that gives fixed answers and remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = answers, []

    def complete(self, prompts, options):
        self.asked += prompts
        return list(self.answers)[: len(prompts)]


def test_votes_of_a_judge_are_averaged():
    votes = ["Good. Score: 8", "score: **6**", "I cannot say.", "Score: 99"]
    judge = Judge(*(Answer(text=text) for text in votes), Answer(error="timeout"))
    reward = ModelJudge(judge, num_votes=5, options=SamplingOptions(temperature=1.0))
    prompt = [{"role": "user", "content": "How {old}?"}]
    assert reward(prompt, "Ten {years}.", None) == pytest.approx((0.8 + 0.6 + 1.0) / 3)
    (message,) = judge.asked[0]
    assert "How {old}?" in message["content"] and "Ten {years}." in message["content"]
    assert len(judge.asked) == 5


def test_a_judge_without_a_verdict_is_a_failure():
    judge = Judge(Answer(error="timeout"), Answer(error="HTTP 500"))
    with pytest.raises(NoVerdict, match="HTTP 500, timeout"):
        ModelJudge(judge, num_votes=2)("q", "a", "r")
    scores = score_all(ModelJudge(judge, num_votes=2), [Sample("q", "a")], max_failed_fraction=1.0)
    assert scores.failures == {"NoVerdict": 1}


def test_weighted_sum():
    reward = Weighted((0.5, BoxedAnswer()), (0.5, Format()))
    assert reward("", r"<think>x</think>\boxed{1}", "1") == 1.0
    assert reward("", r"\boxed{1}", "1") == 0.5


def misbehaving(prompt, answer, reference):
    if answer == "raise":
        raise ValueError("no")
    if answer == "hang":
        time.sleep(60)
    return {"nan": float("nan"), "inf": float("inf"), "none": None}.get(answer, 2.5)


def test_failures_are_counted_by_reason_in_bounded_time():
    answers = ["fine", "raise", "hang", "nan", "fine", "inf", "none", "hang", "fine", "raise"]
    begin = time.monotonic()
    scores = score_all(
        misbehaving,
        [Sample("", answer) for answer in answers],
        seconds=0.5,
        num_threads=2,
        max_failed_fraction=0.7,
    )
    assert time.monotonic() - begin < 10
    fine = np.array([answer == "fine" for answer in answers])
    np.testing.assert_array_equal(scores.valid_N, fine)
    np.testing.assert_array_equal(scores.values_N, np.where(fine, np.float32(2.5), 0))
    expected = {"ValueError": 2, "hung": 2, "NaN": 1, "infinite": 1, "TypeError": 1}
    assert scores.failures == expected


def test_values_stay_with_their_samples():
    def slow(prompt, answer, reference):
        time.sleep(0.02 * (reference % 3))
        return reference

    scores = score_all(slow, [Sample("", "", i) for i in range(30)], num_threads=7)
    np.testing.assert_array_equal(scores.values_N, np.arange(30))


def test_too_many_failures_stop_the_run():
    samples = [Sample("", "raise")] * 3 + [Sample("", "nan")] * 7
    with pytest.raises(UserError) as error:
        score_all(misbehaving, samples, num_threads=1, max_failed_fraction=0.35)
    assert re.search(
        r"4 failed \(ValueError 3, NaN 1\), more than the 3 accepted", str(error.value)
    )
    assert "\n" not in str(error.value)


def test_nothing_to_score():
    scores = score_all(misbehaving, [])
    assert scores.values_N.shape == (0,) and scores.failures == {}

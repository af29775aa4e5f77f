"""A benchmark from prompts to score: a server with known answers gets exactly its known score."""

import dataclasses
import json
import random
import re
import time

import pytest
from stub_server import Stub, stub

from dsv3_jax.errors import UserError
from dsv3_jax.evals.endpoint import HttpEndpoint, HttpOptions
from dsv3_jax.evals.run import Settings, evaluate
from dsv3_jax.evals.statistics import pass_at_k, wilson_interval
from dsv3_jax.evals.tasks import TASKS

TASK = TASKS["gsm8k"]
FAST = HttpOptions(timeout_seconds=0.4, num_retries=1, retry_seconds=0.01, concurrency=8)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    path = tmp_path_factory.mktemp("items") / "gsm8k.jsonl"
    records = [
        {"question": f"What is {i} times 7?", "answer": f"{i} * 7 = {7 * i}\n#### {7 * i:,}"}
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return TASK.items(path)


def answering(says):
    """A behaviour: `says` maps the number that an item asks about to a text or misbehaviour."""
    return lambda question, body: says(int(re.findall(r"What is (\d+) times", question)[-1]))


def test_known_answers_give_the_known_score_and_failures_their_reasons(items):
    """Right, wrong, garbage, silent, broken: each a known share of the items."""
    kinds = ["right"] * 120 + ["wrong"] * 60 + [Stub.GARBAGE] * 8 + [Stub.SILENT] * 6
    kinds += [Stub.BROKEN] * 4 + [Stub.NULL] * 2
    random.Random(0).shuffle(kinds)

    def says(i):
        right = {"right": f"7 times {i} is\n#### {7 * i}", "wrong": f"#### {7 * i + 1}"}
        return right.get(kinds[i], kinds[i])

    done = []
    with stub(answering(says)) as server:
        begin = time.monotonic()
        outcome = evaluate(
            TASK,
            items,
            HttpEndpoint(server.url, options=FAST),
            Settings(shots=0, max_failures=20),
            progress=lambda *counts: done.append(counts),
        )
        assert time.monotonic() - begin < 30
    assert outcome.score == 120 / 200 and outcome.pass_at == {1: pytest.approx(0.6)}
    assert outcome.interval == wilson_interval(120, 200)
    assert outcome.failures == {"garbage": 8, "timeout": 6, "HTTP 500": 4, "no text": 2}
    assert [mark.right for mark in outcome.marks] == [kind == "right" for kind in kinds]
    assert [mark.item for mark in outcome.marks] == list(range(200))
    assert done[-1] == (200, 200)


def test_too_many_failures_stop_the_run_early(items):
    with stub(answering(lambda i: Stub.GARBAGE)) as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
        with pytest.raises(UserError) as error:
            evaluate(TASK, items, endpoint, Settings(shots=0, max_failures=5))
    assert "GSM8K: 6 failed (garbage 6), more than the 5 accepted" in str(error.value)
    assert len(server.bodies) < len(items)


def test_examples_are_not_the_item_itself_and_stop_ends_the_next_question(items):
    with stub(answering(lambda i: f"#### {7 * i}")) as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
        outcome = evaluate(TASK, items[:10], endpoint, Settings(), items)
    assert outcome.score == 1.0 and outcome.shots == 8
    for body in server.bodies:
        questions = [line for line in body["prompt"].split("\n") if line.startswith("Question:")]
        assert len(questions) == 9 == len(set(questions))
        assert body["stop"] == ["\nQuestion:"] and body["temperature"] == 0.0


def test_pass_at_k_of_several_samples(items):
    def behave(question, body):
        i = int(re.findall(r"What is (\d+) times", question)[-1])
        sample = (body["seed"] - 10) % 5  # item i is right in i of its 5 samples
        return f"#### {7 * i}" if sample < i else "#### -1"

    with stub(behave) as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
        settings = Settings(chat=True, num_samples=5, ks=(1, 3), temperature=1.0, seed=10)
        outcome = evaluate(TASK, items[:6], endpoint, settings)
    assert outcome.score == pytest.approx(sum(range(6)) / 30)
    for k in (1, 3):
        assert outcome.pass_at[k] == pytest.approx(sum(pass_at_k(5, c, k) for c in range(6)) / 6)
    low, high = outcome.interval
    assert 0 <= low < outcome.score < high <= 1
    assert len({body["seed"] for body in server.bodies}) == 30, "samples differ by their seed"


def test_marking_that_raises_is_counted(items):
    def is_right(item, text):
        raise TimeoutError

    with stub(answering(lambda i: "x")) as server:
        outcome = evaluate(
            dataclasses.replace(TASK, is_right=is_right),
            items[:3],
            HttpEndpoint(server.url, options=FAST),
            Settings(shots=0),
        )
    assert outcome.failures == {"marking: TimeoutError": 3} and outcome.score == 0


def test_the_published_gsm8k_with_known_answers(gsm8k_file):
    items = TASK.items(gsm8k_file("test"))
    wrong = set(random.Random(1).sample(range(len(items)), 500))
    index = {item.question: i for i, item in enumerate(items)}

    def behave(question, body):
        i = index[question.split("\nAnswer:")[0].removeprefix("Question: ")]
        return "#### 0.5" if i in wrong else items[i].solution

    with stub(behave) as server:
        outcome = evaluate(
            TASK, items, HttpEndpoint(server.url, options=HttpOptions()), Settings(shots=0)
        )
    assert outcome.score == (1319 - 500) / 1319 and outcome.failures == {}

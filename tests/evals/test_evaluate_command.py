"""`python -m experiments.evaluate`: its table, its JSON and its exit codes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hurry import COMMAND_FLAGS
from stub_server import Stub, stub

from dsv3_jax.evals.perplexity import Scorer, score_text

ROOT = Path(__file__).parents[2]


def evaluate(*arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": COMMAND_FLAGS,
    }
    return subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory):
    path = tmp_path_factory.mktemp("gsm8k") / "gsm8k.jsonl"
    records = [{"question": f"What is {i} times 7?", "answer": f"#### {7 * i}"} for i in range(20)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def three_of_four(question, body):
    i = int(re.findall(r"What is (\d+) times", question)[-1])
    return Stub.GARBAGE if i % 4 == 0 else f"#### {7 * i}"


def test_json_of_an_endpoint(gsm8k, tmp_path):
    with stub(three_of_four) as server:
        done = evaluate(
            f"--endpoint={server.url}",
            f"--task=gsm8k={gsm8k}",
            f"--examples=gsm8k={gsm8k}",
            "--limit=12",
            "--format=json",
            f"--output={tmp_path}",
        )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    (task,) = results["tasks"]
    assert task["score"] == 75.0 and task["items"] == 12 and task["shots"] == 8
    assert task["interval"] == [pytest.approx(46.77, abs=0.01), pytest.approx(91.11, abs=0.01)]
    assert task["failures"] == {"garbage": 3}
    assert task["published"]["scores"] == {"V3": 89.3, "V2": 81.6}
    lines = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text().splitlines()]
    assert [line["failure"] for line in lines] == (["garbage", None, None, None] * 3)
    assert lines[1]["text"] == "#### 7" and lines[1]["right"] and lines[1]["reference"] == "7"


def test_table_of_a_chat(gsm8k):
    with stub(three_of_four) as server:
        done = evaluate(f"--endpoint={server.url}", f"--task=gsm8k={gsm8k}", "--chat")
        assert all("messages" in body for body in server.bodies)
    assert done.returncode == 0, done.stderr
    assert re.search(r"GSM8K +│ +20 │ +0 │ +75.0 │ +53.1 to 88.8 │ +5", done.stdout), done.stdout
    assert "counted as wrong: garbage 5" in done.stdout


@pytest.mark.slow
def test_texts_and_tasks_of_a_checkpoint(folder, model, tokenizer, gsm8k, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is it? It is what it is. " * 3)
    done = evaluate(
        f"--checkpoint={folder}",
        f"--text={text}",
        f"--task=gsm8k={gsm8k}",
        *("--limit=2", "--shots=0", "--max_tokens=4", "--context_tokens=64", "--format=json"),
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    score = score_text(Scorer(model, 64), tokenizer, text.read_text())
    (found,) = results["texts"]
    assert found["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert found["perplexity"] == pytest.approx(score.perplexity, rel=1e-5)
    assert results["tasks"][0]["items"] == 2 and results["tasks"][0]["cut"] <= 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--task=gsm8k=x.jsonl"], "--checkpoint=DIR or --endpoint=URL"),
        (["--endpoint=http://127.0.0.1:9/v1"], "nothing to do"),
        (["--endpoint=http://127.0.0.1:9/v1", "--task=gsm9k=GSM8K"], "did you mean 'gsm8k'"),
        (["--endpoint=http://127.0.0.1:9/v1", "--task=gsm8k=none.jsonl"], "No such file"),
        (["--endpoint=http://127.0.0.1:9/v1", "--task=gsm8k=GSM8K"], "connection failed"),
        (["--endpoint=http://127.0.0.1:9/v1", "--text=x.txt"], "--text needs probabilities"),
        (["--checkpoint=none", "--task=gsm8k=GSM8K", "--pass_k=4"], "from 1 to --samples=1"),
        (["--checkpoint=none", "--task=gsm8k=GSM8K", "--samples=4"], "--temperature=0.7"),
        (["--checkpoint=none", "--task=gsm8k=GSM8K", "--limit=0"], "--limit"),
    ],
)
def test_mistakes_end_with_one_line(gsm8k, arguments, message):
    done = evaluate(*(argument.replace("GSM8K", str(gsm8k)) for argument in arguments))
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_too_few_examples_and_too_many_failures_end_with_one_line(gsm8k):
    with stub(lambda question, body: Stub.GARBAGE) as server:
        common = (f"--endpoint={server.url}", f"--task=gsm8k={gsm8k}")
        few = evaluate(*common)
        failed = evaluate(*common, "--shots=0", "--max_failures=3")
    for done, message in [(few, "0 examples for 8 shots"), (failed, "4 failed (garbage 4)")]:
        assert done.returncode == 2 and message in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1

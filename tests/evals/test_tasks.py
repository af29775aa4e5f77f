"""Benchmarks: their published formats read, asked and marked."""

import csv
import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dsv3_jax.errors import UserError
from dsv3_jax.evals.tasks import TASKS

GSM8K = {
    "question": "Ann has 16 eggs and eats 3. How many are left?",
    "answer": "She has 16 - 3 = <<16-3=13>>13 eggs.\n#### 13",
}
MATH = {
    "problem": r"What is $\frac{1}{4} + \frac{1}{4}$?",
    "solution": r"It is $\boxed{\frac{1}{2}}$.",
    "answer": r"\frac{1}{2}",
    "subject": "Prealgebra",
    "level": 1,
    "unique_id": "test/prealgebra/1.json",
}
MMLU_PRO = {
    "question_id": 70,
    "question": "Which is even?",
    "options": ["1", "2", "3", "N/A"],
    "answer": "B",
    "answer_index": 1,
    "cot_content": "A: Let's think step by step. 2 is. The answer is (B).",
    "category": "math",
    "src": "x",
}
GPQA = {
    "Record ID": "rec1",
    "Question": "Which is prime?\n",
    "Correct Answer": "7\n",
    "Incorrect Answer 1": "8",
    "Incorrect Answer 2": "9",
    "Incorrect Answer 3": "10",
}
HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
}


def item_of(tmp_path, task, record):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (item,) = TASKS[task].items(path)
    return item


def test_gsm8k(tmp_path):
    task, item = TASKS["gsm8k"], item_of(tmp_path, "gsm8k", GSM8K)
    assert item.reference == "13"
    for text in ("#### 13", "13 eggs", r"\boxed{13}", "$13.00", "10 and 3 make 13."):
        assert task.is_right(item, text), text
    for text in ("#### 12", "13 - 3 = 10", "", "thirteen"):
        assert not task.is_right(item, text), text


def test_math500(tmp_path):
    task, item = TASKS["math500"], item_of(tmp_path, "math500", MATH)
    assert task.is_right(item, r"\boxed{0.5}") and task.is_right(item, r"\boxed{\dfrac{1}{2}}")
    assert not task.is_right(item, r"\frac{1}{2}") and not task.is_right(item, r"\boxed{2}")
    unsolved = {key: value for key, value in MATH.items() if key != "answer"}
    assert item_of(tmp_path, "math500", unsolved).reference == r"\frac{1}{2}"


def test_mmlu_pro_from_jsonl_and_parquet(tmp_path):
    task, item = TASKS["mmlu_pro"], item_of(tmp_path, "mmlu_pro", MMLU_PRO)
    assert item.question == "Which is even?\nA. 1\nB. 2\nC. 3"
    assert task.is_right(item, "The answer is (B).") and not task.is_right(item, "answer is (A)")
    path = tmp_path / "items.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([MMLU_PRO]), path)
    assert task.items(path) == [item]


def test_gpqa_options_keep_a_random_order(tmp_path):
    path = tmp_path / "gpqa_diamond.csv"
    records = [{**GPQA, "Question": f"Which is prime, {i}?"} for i in range(80)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, GPQA)
        writer.writeheader()
        writer.writerows(records)
    items = TASKS["gpqa_diamond"].items(path)
    assert items == TASKS["gpqa_diamond"].items(path)
    right = [item.reference for item in items]
    assert all(10 <= right.count(letter) <= 30 for letter in "ABCD"), right
    for item in items:
        assert f"\n{item.reference}. 7" in item.question
        assert TASKS["gpqa_diamond"].is_right(item, f"The answer is ({item.reference})")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of Linux")
def test_humaneval_from_a_gzipped_file(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(HUMANEVAL).encode()))
    task = TASKS["humaneval"]
    (item,) = task.items(path)
    assert task.is_right(item, HUMANEVAL["canonical_solution"])
    assert task.is_right(item, "```python\ndef double(x):\n    return x + x\n```")
    assert not task.is_right(item, "    return x\n")
    assert not task.is_right(item, "    return 2 * x\nimport sys; sys.exit(0)\n")


def test_few_shot_prompt_and_chat(tmp_path):
    task, item = TASKS["gsm8k"], item_of(tmp_path, "gsm8k", GSM8K)
    example = item_of(tmp_path, "gsm8k", {"question": "1 + 1?", "answer": "2\n#### 2"})
    assert task.prompt(item, [example], chat=False) == (
        "Question: 1 + 1?\nAnswer: 2\n#### 2\n\n"
        "Question: Ann has 16 eggs and eats 3. How many are left?\nAnswer:"
    )
    (message,) = task.prompt(item, (), chat=True)
    assert message["role"] == "user" and message["content"].startswith(GSM8K["question"])
    assert r"\boxed{}" in message["content"]


def test_examples_are_others_and_of_the_same_subject(tmp_path):
    task, item = TASKS["mmlu_pro"], item_of(tmp_path, "mmlu_pro", MMLU_PRO)
    pool = [
        item,
        item_of(tmp_path, "mmlu_pro", {**MMLU_PRO, "question": "x", "category": "law"}),
        item_of(tmp_path, "mmlu_pro", {**MMLU_PRO, "question": "y"}),
    ]
    assert task.examples(item, pool, 1) == pool[2:]
    with pytest.raises(UserError, match="1 examples of 'math' for 2 shots"):
        task.examples(item, pool, 2)


@pytest.mark.parametrize(
    "task, name, text, message",
    [
        ("gsm8k", "x.jsonl", '{"question": "q"}', r"record 1 .*lacks 'answer'"),
        ("gsm8k", "x.jsonl", '{"question": "q", "answer": "4"}', "has no ####"),
        ("gsm8k", "x.jsonl", "[1]", "record 1 is not one of GSM8K"),
        ("gsm8k", "x.jsonl", "{", "cannot be read"),
        ("gsm8k", "x.jsonl", "", "holds no records"),
        ("gsm8k", "x.txt", "", "of no known kind"),
        ("gsm8k", "missing.jsonl", None, "No such file"),
        ("humaneval", "x.jsonl.gz", "not gzip", "cannot be read"),
        ("mmlu_pro", "x.parquet", "not parquet", "cannot be read"),
        ("mmlu_pro", "x.jsonl", json.dumps({**MMLU_PRO, "answer": "D"}), "none of its 3 options"),
    ],
)
def test_files_that_are_not_the_benchmark(tmp_path, task, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        TASKS[task].items(path)
    assert "\n" not in str(error.value)


def test_the_published_gsm8k(gsm8k_file):
    items = TASKS["gsm8k"].items(gsm8k_file("test"))
    assert len(items) == 1319
    assert all(TASKS["gsm8k"].is_right(item, item.solution) for item in items)
    assert Path(gsm8k_file("train")).is_file()


def test_problems_of_ones_own_are_right_when_the_answer_is_that_alone(tmp_path):
    task, path = TASKS["problems"], tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "7+8=", "answer": 15}\n{"prompt": "1+1=", "answer": "2"}\n')
    first, second = task.items(path)
    assert task.prompt(first, (), chat=True) == [{"role": "user", "content": "7+8="}]
    assert task.prompt(second, (), chat=False) == "1+1="
    assert task.is_right(first, " 15") and not task.is_right(first, "15 or 16")
    path.write_text('{"prompt": [], "answer": 15}\n')
    with pytest.raises(UserError, match="record 1 .* prompt is not text"):
        task.items(path)

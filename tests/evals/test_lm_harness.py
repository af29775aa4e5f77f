"""The adapter under lm-evaluation-harness itself: its scores are ours on the same items."""

import json
import random
import re

import numpy as np
import pytest
from stub_server import Stub, stub

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra 'eval'")

from lm_eval.api.instance import Instance  # noqa: E402

from dsv3_jax.errors import UserError  # noqa: E402
from dsv3_jax.evals.endpoint import HttpEndpoint, HttpOptions  # noqa: E402
from dsv3_jax.evals.lm_harness import HarnessModel, load_harness_model  # noqa: E402
from dsv3_jax.evals.perplexity import score_text  # noqa: E402
from dsv3_jax.evals.run import Settings, evaluate  # noqa: E402
from dsv3_jax.evals.tasks import TASKS  # noqa: E402

FAST = HttpOptions(timeout_seconds=5.0, num_retries=0)


@pytest.fixture(scope="module")
def harness(folder):
    return load_harness_model(folder, window=32, rows=3)


def instances(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=i)
        for i, each in enumerate(arguments)
    ]


def test_log_likelihoods_of_continuations(harness, forced, tokenizer):
    pairs = [("What is it?", " It is"), ("", "What"), ("It is ", "it."), ("is it " * 20, "it?")]
    results = harness.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, results, strict=True):
        whole = tokenizer.encode(context + continuation)
        count = len(whole) - len(tokenizer.encode(context.rstrip()))
        ids = [tokenizer.bos_id, *whole][-33:]  # what is too long loses its beginning
        logits, targets = forced(ids)[-count - 1 : -1], np.array(ids[-count:])
        chosen = logits[np.arange(count), targets]
        expected = (chosen - np.log(np.exp(logits).sum(-1))).sum()
        assert logprob == pytest.approx(expected, rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == targets).all())


def test_rolling_log_likelihood_is_that_of_the_text(harness, tokenizer):
    text = "What is it? It is it. " * 5
    (logprob,) = harness.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    assert logprob == pytest.approx(-score_text(harness._scorer, tokenizer, text).nats, rel=1e-6)


def test_generation_ends_as_the_task_says(harness, greedy, tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("What is")]
    tokens = [*greedy(ids, 8), tokenizer.eos_id]
    text = tokenizer.decode(tokens[: tokens.index(tokenizer.eos_id)])
    settings = {"until": [text[3:5]], "max_gen_toks": 8, "do_sample": False, "temperature": 1.0}
    (generated,) = harness.generate_until(instances("generate_until", ("What is", settings)))
    assert generated == text[: text.index(text[3:5])]


def test_the_harness_and_we_agree_on_the_same_items(tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    records = [{"question": f"What is {i} times 7?", "answer": f"#### {7 * i}"} for i in range(40)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    wrong = set(random.Random(0).sample(range(40), 13))

    def behave(question, body):
        i = int(re.findall(r"What is (\d+) times", question)[-1])
        return f"Think.\n#### {7 * i + (i in wrong)}"

    task = {
        "task": "gsm8k_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip()}}",
        "generation_kwargs": {"until": ["\nQuestion:"], "do_sample": False, "max_gen_toks": 64},
        "filter_list": [
            {
                "name": "number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean"}],
    }
    with stub(behave) as server:
        endpoint = HttpEndpoint(server.url, options=FAST)
        ours = evaluate(TASKS["gsm8k"], TASKS["gsm8k"].items(path), endpoint, Settings(shots=0))
        for chat in (False, True):
            server.bodies.clear()
            results = lm_eval.simple_evaluate(
                model=HarnessModel(endpoint),
                tasks=[task],
                apply_chat_template=chat,
                bootstrap_iters=0,
            )
            theirs = results["results"]["gsm8k_local"]["exact_match,number"]
            assert theirs == ours.score == 27 / 40
            assert all(("messages" in body) == chat for body in server.bodies)


def test_failures_are_counted_and_bounded():
    with stub(lambda question, body: Stub.GARBAGE) as server:
        model = HarnessModel(HttpEndpoint(server.url, options=FAST), max_failures=3)
        requests = instances("generate_until", *[("a", {"until": ["\n"]})] * 3)
        assert model.generate_until(requests) == ["", "", ""]
        assert model.failures.counts == {"garbage": 3}
        with pytest.raises(UserError, match="4 failed"):
            model.generate_until(requests)


def test_an_endpoint_tells_no_probabilities():
    with stub(lambda question, body: "x") as server:
        model = HarnessModel(HttpEndpoint(server.url, options=FAST))
    with pytest.raises(UserError, match="give a checkpoint"):
        model.loglikelihood(instances("loglikelihood", ("a", "b")), disable_tqdm=True)

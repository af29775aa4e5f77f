"""Any bytes as the body of a request: an answer or a 4xx that says why, never a 5xx."""

import json

import httpx
import pytest
from fake_engine import FakeEngine
from fuzzing import damaged, fuzz
from running_server import MODEL, serving, small_tokenizer

BODIES = {
    "/v1/completions": {"model": MODEL, "prompt": "Say it", "max_tokens": 2, "stop": ["a"]},
    "/v1/chat/completions": {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say it"}],
        "max_tokens": 2,
        "logit_bias": {"1": 2},
    },
}


@pytest.mark.parametrize("path", BODIES)
def test_http_bodies(path):
    tokenizer = small_tokenizer()
    engine = FakeEngine(end=tokenizer.eos_id)
    with (
        serving(engine, tokenizer, max_body_bytes=1 << 20, body_seconds=5) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        headers = {"content-type": "application/json"}

        def check(content):
            answer = client.post(path, content=content, headers=headers)
            assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
            assert answer.status_code == 200 or answer.json()["error"]["message"]

        fuzz(f"HTTP bodies of {path}", damaged(json.dumps(BODIES[path]).encode()), check)
        assert client.get("/health").json() == {"status": "ready"}

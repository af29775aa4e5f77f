"""`python -m tools.soak_server`: thousands of requests, a third given up; nothing is lost."""

import json
import os
import subprocess
import sys
import urllib.request

import pytest
from fake_engine import FakeEngine
from running_server import serving, small_tokenizer
from serve_process import ROOT, SMALL, save_folder, start

from tools.text import num_ended


def soak(url, *arguments):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tools.soak_server", f"--url={url}", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)


def test_losses_are_found():
    tokenizer = small_tokenizer()
    engine = FakeEngine(end=tokenizer.eos_id)
    with serving(engine, tokenizer) as running:
        done = soak(running.url, "--num_requests=100")
        assert done.returncode == 0 and "nothing was lost" in done.stdout, done.stdout + done.stderr
        assert "given up" in done.stdout and engine.cancelled > 3
        engine.fails_on = tokenizer.encode(" def")[0]
        done = soak(running.url, "--num_requests=100")
        assert done.returncode == 1 and "answers 500" in done.stdout
    done = soak(running.url, "--num_requests=10")
    assert done.returncode == 2 and "does not answer" in done.stderr


@pytest.mark.slow
def test_ten_thousand_requests(tmp_path):
    save_folder(tmp_path / "awake")
    process = start(tmp_path / "awake", *SMALL, "--port=0", "--context_tokens=128")
    try:
        url = process.stdout.readline().split()[-1].removesuffix("/v1")
        done = soak(url, "--num_requests=10000", f"--pid={process.pid}", "--max_tokens=16")
        assert done.returncode == 0, done.stdout + done.stderr
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            assert b'status="5' not in answer.read()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


def test_ends_are_counted_whatever_the_text_holds():
    choice = {"text": "a\x85b\u2028c\x1cd", "finish_reason": "stop"}
    event = json.dumps({"choices": [choice, choice]}, ensure_ascii=False)
    assert num_ended(f"data: {event}\n\ndata: {event}\n\ndata: [DONE]\n\n", stream=True) == 4
    assert num_ended(event, stream=False) == 2

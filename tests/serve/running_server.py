"""Servers for tests: a port of this process, with the fake engine or another behind it."""

import contextlib
import functools
import socket
import threading
import time

import uvicorn

from dsv3_jax.data.chat import ChatTemplate
from dsv3_jax.data.tokenizer import train_tokenizer
from dsv3_jax.serve.server import ServerOptions, make_app

MODEL = "tiny/test"


class Running:
    """A server that answers: its address, its engine and what was reported of a failure."""

    def __init__(self, url, engine, tokenizer):
        self.url, self.engine, self.tokenizer, self.failures = url, engine, tokenizer, []

    def until_idle(self, seconds=5.0):
        """Waits until the engine has nothing to do; false when it still has."""
        end = time.monotonic() + seconds
        while self.engine.has_work and time.monotonic() < end:
            time.sleep(0.005)
        return not self.engine.has_work


@contextlib.contextmanager
def serving(engine, tokenizer, **options):
    """A `Running` on a port of its own, shut down gracefully at the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, tokenizer)
    options = {"context_tokens": 256, "vocab_size": tokenizer.vocab_size, **options}
    app = make_app(
        engine,
        tokenizer,
        ChatTemplate(),
        ServerOptions(model_name=MODEL, **options),
        on_failure=lambda: running.failures.append(1),
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield running
    finally:
        server.should_exit = True
        thread.join()


@functools.cache
def small_tokenizer():
    return train_tokenizer(["Say it again, café 🙂 and END of it.\n"] * 20, 320)

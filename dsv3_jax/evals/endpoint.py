"""A model that answers prompts: one protocol, for a server anywhere and for one of this process.

What an endpoint cannot answer comes back as an `Answer` with an error, never as an exception, so
that one bad prompt does not end a run of thousands: callers count errors by reason (`failures.py`).
"""

import json
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Protocol

from dsv3_jax.errors import UserError, did_you_mean

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt = str | Sequence[Message]  # a text to continue, or a conversation to answer

_MAX_ANSWER_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How prompts are answered."""

    max_tokens: int = 1024
    temperature: float = 0.0  # 0: the most likely token each time
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # the text ends before any of them
    seed: int | None = None  # of the first prompt; each further one has the next number


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for one prompt."""

    text: str = ""
    finish_reason: str | None = None  # 'stop', 'length'
    error: str | None = None  # None: answered; else a reason of few words, 'timeout', 'HTTP 500'


class Endpoint(Protocol):
    """Answers prompts."""

    def complete(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Answer]:
        """One answer for each prompt, in their order. Returns in bounded time."""
        ...


@dataclass(frozen=True, kw_only=True)
class HttpOptions:
    """Bounds of the calls to a server."""

    timeout_seconds: float = 120.0  # of connecting, and of a try from there to the last byte
    num_retries: int = 2  # after 429, 5xx and broken connections; a timeout is not tried again
    retry_seconds: float = 1.0  # before the first retry; doubled for each further one
    concurrency: int = 8  # calls at once


def key_from_environment(flag: str, variable: str | None) -> str | None:
    """The key in an environment variable, so that none is written into a command; None: no key.

    Raises:
      UserError: the variable is not set.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UserError(f"{flag}: the variable {variable} is not set; set it")
    return os.environ[variable]


class HttpEndpoint:
    """An OpenAI-compatible server, `experiments.serve` included.

    A text goes to /completions and a conversation to /chat/completions.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        options: HttpOptions = HttpOptions(),  # noqa: B008 (frozen)
    ):
        """Finds the server.

        Args:
          url: of its API, such as http://127.0.0.1:8000/v1; without a path, /v1 is meant.
          model: None: the first that the server names.
          api_key: sent as a bearer token.

        Raises:
          UserError: not a URL, no server there, or it does not have the model.
        """
        parts = urllib.parse.urlsplit(url)
        try:
            self._address = (parts.hostname, parts.port)
        except ValueError:
            self._address = (None, None)
        if parts.scheme not in ("http", "https") or not self._address[0]:
            raise UserError(f"endpoint {url!r} is not a URL; write http://HOST:PORT/v1")
        self._connection = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._path, self._options = parts.path.rstrip("/") or "/v1", options
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.url = url
        self.model = self._find_model(model)

    def complete(self, prompts: Sequence[Prompt], options: SamplingOptions) -> list[Answer]:
        """As the protocol says; takes at most tries x timeout for each `concurrency` prompts."""
        with ThreadPoolExecutor(self._options.concurrency) as pool:
            return list(
                pool.map(lambda i: self._answer(i, prompts[i], options), range(len(prompts)))
            )

    def _find_model(self, model: str | None) -> str:
        status, body = self._exchange("GET", "/models", None)
        try:
            names = [entry["id"] for entry in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            names = []
        if status == 200 and (model in names or (model is None and names)):
            return model or names[0]
        if status == 200 and names:
            raise UserError(
                f"model {model!r} is not served at {self.url};{did_you_mean(model, names)} it has "
                f"{', '.join(names)}"
            )
        if model is not None and status == 404:  # not every server lists its models
            return model
        found = f"HTTP {status}" if isinstance(status, int) else status
        raise UserError(
            f"no OpenAI-compatible server answers at {self.url}{self._shown_path} ({found}); "
            "check the address, the key and that the server runs"
        )

    @property
    def _shown_path(self) -> str:
        return "" if self.url.rstrip("/").endswith(self._path) else self._path

    def _answer(self, index: int, prompt: Prompt, options: SamplingOptions) -> Answer:
        body = {
            "model": self.model,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        if options.stop:
            body["stop"] = list(options.stop)
        if options.seed is not None:
            body["seed"] = options.seed + index
        if isinstance(prompt, str):
            path, body["prompt"] = "/completions", prompt
        else:
            path, body["messages"] = "/chat/completions", list(prompt)
        for attempt in range(self._options.num_retries + 1):
            if attempt:
                time.sleep(self._options.retry_seconds * 2 ** (attempt - 1))
            status, data = self._exchange("POST", path, json.dumps(body).encode())
            if status == 200:
                return _read(data)
            if status == "timeout" or (isinstance(status, int) and status != 429 and status < 500):
                break
        return Answer(error=f"HTTP {status}" if isinstance(status, int) else status)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[int | str, bytes]:
        """One try: the status and the body, or a reason and nothing."""
        seconds = self._options.timeout_seconds
        connection = self._connection(*self._address, timeout=seconds)
        late = threading.Event()

        def cut(sock: socket.socket) -> None:
            late.set()
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has just ended

        timer = None
        try:
            connection.connect()
            # The socket's own timeout starts anew with every byte: a server that drips never ends.
            timer = threading.Timer(seconds, cut, (connection.sock,))
            timer.daemon = True
            timer.start()
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            status, data = response.status, response.read(_MAX_ANSWER_BYTES + 1)
        except (OSError, HTTPException) as error:
            if late.is_set() or isinstance(error, TimeoutError):
                return "timeout", b""
            return "connection failed" if isinstance(error, OSError) else "garbage", b""
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()
        if late.is_set():
            return "timeout", b""
        return ("answer too long", b"") if len(data) > _MAX_ANSWER_BYTES else (status, data)


def _read(data: bytes) -> Answer:
    """The answer in a body of /completions or /chat/completions."""
    try:
        choice = json.loads(data)["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        reason = choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return Answer(error="garbage")
    if not isinstance(text, str):  # null: tool calls, or a refusal
        return Answer(error="no text")
    return Answer(text=text, finish_reason=reason)

"""Sends a running server many requests, some of them given up half way, and checks what is left.

    python -m tools.soak_server --url=http://127.0.0.1:8000 [--num_requests=10000] [--pid=PID]

Completions and chats, whole and streamed, with several choices, stop strings and mistakes, all at
random. Needs: no answer 5xx, none lost, no row or queued request left, and resident memory of the
process PID that grew by less than 5 % after the first tenth. Exit code 1 when one of them fails.
"""

import asyncio
import collections
import dataclasses
import os
import random
import time
from pathlib import Path

import httpx
from absl import flags

from dsv3_jax.errors import UserError, run_main
from tools.text import aligned, num_ended

_URL = flags.DEFINE_string("url", "http://127.0.0.1:8000", "Of the server, without /v1.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 10_000, "In all.", lower_bound=10)
_CONCURRENCY = flags.DEFINE_integer("concurrency", 32, "At a time.", lower_bound=1)
_CANCELLED = flags.DEFINE_float(
    "cancelled", 1 / 3, "Fraction given up half way.", lower_bound=0, upper_bound=1
)
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Of an answer, at most.", lower_bound=1)
_PID = flags.DEFINE_integer("pid", None, "The server's process, if its memory is to be watched.")
_API_KEY_ENV = flags.DEFINE_string("api_key_env", None, "Environment variable with the key.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is sent.")

_WORDS = "it is what a café 🙂 def return\n the end of".split(" ")


@dataclasses.dataclass
class Report:
    """What came back."""

    outcomes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    incomplete: int = 0  # answers with status 200 that lack a choice's end
    rss_bytes: list[int] = dataclasses.field(default_factory=list)  # after each tenth
    left: dict[str, float] = dataclasses.field(default_factory=dict)  # rows and queue, at the end
    seconds: float = 0.0

    @property
    def failures(self) -> list[str]:
        found = [f"{n} answers {kind}" for kind, n in self.outcomes.items() if kind[0] in "5l"]
        if self.incomplete:
            found.append(f"{self.incomplete} answers incomplete")
        found += [f"{name} is {value:g}" for name, value in self.left.items() if value]
        if self.rss_bytes and self.rss_growth >= 0.05:
            found.append(f"memory grew by {self.rss_growth:.1%}")
        return found

    @property
    def rss_growth(self) -> float:
        return self.rss_bytes[-1] / self.rss_bytes[0] - 1


async def soak(
    http: httpx.AsyncClient,
    num_requests: int,
    *,
    concurrency: int,
    cancelled: float,
    max_tokens: int,
    pid: int | None,
    seed: int,
) -> Report:
    """Sends the requests and waits until the server is idle again."""
    report, rng, start = Report(), random.Random(seed), time.monotonic()
    model = (await http.get("/v1/models")).json()["data"][0]["id"]
    numbers = iter(range(1, num_requests + 1))

    async def work() -> None:
        for number in numbers:
            path, body = _request(rng, model, max_tokens)
            if rng.random() < cancelled:
                outcome = await _give_up(http, path, body, rng.expovariate(20))
            else:
                outcome = await _send(http, path, body, report)
            report.outcomes[outcome] += 1
            if pid is not None and number % (num_requests // 10) == 0:
                report.rss_bytes.append(_rss_bytes(pid))

    await asyncio.gather(*(work() for _ in range(concurrency)))
    report.seconds = time.monotonic() - start
    end = time.monotonic() + 60
    while time.monotonic() < end:
        report.left = await _left(http)
        if not any(report.left.values()):
            break
        await asyncio.sleep(0.1)
    return report


def _request(rng: random.Random, model: str, max_tokens: int) -> tuple[str, dict]:
    text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 20)))
    body = {
        "model": model,
        "max_tokens": rng.randint(1, max_tokens),
        "temperature": rng.choice((0, 1)),
        "n": rng.choice((1, 1, 1, 2, 3)),
        "stream": rng.random() < 0.5,
        "stop": rng.choice((None, "e", ["it", "\n"])),
        "logprobs": None,
    }
    if rng.random() < 0.05:  # a mistake
        body[rng.choice(("n", "temperature", "stop", "model", "tool"))] = -1
    if rng.random() < 0.5:
        return "/v1/completions", body | {"prompt": text, "logprobs": rng.choice((None, 3))}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


async def _send(http: httpx.AsyncClient, path: str, body: dict, report: Report) -> str:
    """Outcome of a request: its status, or 'lost' when the connection broke."""
    try:
        answer = await http.post(path, json=body)
    except httpx.TransportError as error:
        return f"lost ({type(error).__name__})"
    if answer.status_code == 429:
        await asyncio.sleep(float(answer.headers["Retry-After"]) * 0.1)
    if answer.status_code == 200 and num_ended(answer.text, body["stream"]) != body["n"]:
        report.incomplete += 1
    return str(answer.status_code)


async def _give_up(http: httpx.AsyncClient, path: str, body: dict, seconds: float) -> str:
    """Sends a request on a connection of its own and closes it after a while.

    Not through the client: its pool loses connections when a task is cancelled.
    """
    request = http.build_request("POST", path, json=body)
    _, writer = await asyncio.open_connection(request.url.host, request.url.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    writer.write(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    try:
        await asyncio.sleep(seconds)
    finally:
        writer.transport.abort()
    return "given up"


async def _left(http: httpx.AsyncClient) -> dict[str, float]:
    names = ("dsv3_engine_rows_used", "dsv3_engine_queued")
    lines = map(str.split, (await http.get("/metrics")).text.splitlines())
    return {line[0]: float(line[1]) for line in lines if line[0] in names}


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; write --url=http://HOST:PORT")
    headers = {}
    if _API_KEY_ENV.value is not None:
        headers["Authorization"] = f"Bearer {os.environ.get(_API_KEY_ENV.value, '')}"

    async def run() -> Report:
        async with httpx.AsyncClient(base_url=_URL.value, headers=headers, timeout=300) as http:
            return await soak(
                http,
                _NUM_REQUESTS.value,
                concurrency=_CONCURRENCY.value,
                cancelled=_CANCELLED.value,
                max_tokens=_MAX_TOKENS.value,
                pid=_PID.value,
                seed=_SEED.value,
            )

    try:
        report = asyncio.run(run())
    except httpx.HTTPError as error:
        raise UserError(f"--url={_URL.value} does not answer: {error}") from None
    rows = [("outcome", "requests"), *((k, f"{n:,}") for k, n in sorted(report.outcomes.items()))]
    print("\n".join(aligned(rows, 1)))
    print(f"{report.seconds:.1f} s, {_NUM_REQUESTS.value / report.seconds:.0f} requests a second")
    if report.rss_bytes:
        mb = [f"{size / 1e6:.1f}" for size in report.rss_bytes]
        print(f"memory, MB: {' '.join(mb)} ({report.rss_growth:+.2%})")
    print("; ".join(report.failures) or "nothing was lost")
    return bool(report.failures)


if __name__ == "__main__":
    run_main(main)

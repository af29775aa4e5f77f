"""An engine in a thread of its own, for coroutines: requests go in, outputs come back.

Only this thread touches the engine. Commands of coroutines wait in a queue that it empties between
two steps, so a request that is cancelled frees its row within a step.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Protocol

from dsv3_jax.errors import UserError
from dsv3_jax.serve.requests import Output, Overloaded, Request


class EngineInterface(Protocol):
    """What is used of `serve.engine.Engine`."""

    @property
    def has_work(self) -> bool: ...
    def submit(self, request: Request) -> int: ...
    def cancel(self, request_id: int) -> None: ...
    def step(self) -> Sequence[Output]: ...
    def statistics(self) -> Any: ...


class EngineFailed(Exception):
    """The engine raised: what ran on it is lost, and it takes nothing more."""


def warm_up(engine: EngineInterface) -> None:
    """Compiles the programs of an engine that nobody uses yet, by a short request."""
    engine.submit(Request(prompt=(0,), max_tokens=3))
    while engine.has_work:
        engine.step()


class Job:
    """Requests that are accepted and cancelled together: the choices of one call."""

    def __init__(self, loop: "EngineLoop", requests: Sequence[Request]):
        self.requests = requests
        self.ids: list[int] = []  # of the engine; its thread fills and reads them
        self.arrived: asyncio.Queue[tuple[int, Output | None]] = asyncio.Queue()
        self._loop, self._unfinished = loop, set(range(len(requests)))

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """(index of the request, its output), until every request has ended or been stopped.

        Raises:
          EngineFailed: some of them never will.
        """
        while self._unfinished:
            index, output = await self.arrived.get()
            if index not in self._unfinished:
                continue
            if output is None:
                raise EngineFailed
            if output.finish_reason is not None:
                self._unfinished.discard(index)
            yield index, output

    def stop(self, index: int) -> None:
        """Ends one request; its row is free before the next step."""
        self._unfinished.discard(index)
        self._loop.cancel(self, [index])

    def cancel(self) -> None:
        """Ends what still runs."""
        unfinished, self._unfinished = sorted(self._unfinished), set()
        if unfinished:
            self._loop.cancel(self, unfinished)


class EngineLoop:
    """Runs an engine; every public method is called in the event loop that started it."""

    def __init__(self, engine: EngineInterface, on_failure: Callable[[], None] = lambda: None):
        """`on_failure` is called in the event loop when a step of the engine raises."""
        self._engine, self._on_failure = engine, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[int, tuple[Job, int]] = {}
        self._stopping = False
        self.failed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._event_loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after the step that it is in; what still runs is dropped."""

        def stop() -> None:
            self._stopping = True

        self._commands.put(stop)
        await asyncio.to_thread(self._thread.join)

    async def submit(self, requests: Sequence[Request]) -> Job:
        """Queues all of the requests, or none.

        Raises:
          UserError: the engine cannot run one of them.
          Overloaded: its queue is full.
          EngineFailed: it runs nothing any more.
        """
        job = Job(self, requests)
        try:
            await self.call(lambda: self._submit(job))
        except BaseException:  # also a cancellation, while the engine may have accepted it
            job.cancel()
            raise
        return job

    def cancel(self, job: Job, indices: Sequence[int]) -> None:
        self._commands.put(lambda: self._cancel(job, indices))

    async def statistics(self) -> Any:
        return await self.call(self._engine.statistics)

    async def call(self, function: Callable[[], Any]) -> Any:
        """The result of a function that the engine's thread calls between two steps."""
        future = self._event_loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.cancelled():
                return
            future.set_result(result) if error is None else future.set_exception(error)

        def command() -> None:
            try:
                result, error = function(), None
            except Exception as raised:
                result, error = None, raised
            self._event_loop.call_soon_threadsafe(settle, result, error)

        self._commands.put(command)
        return await future

    # The rest runs in the engine's thread.

    def _run(self) -> None:
        while not self._stopping:
            waiting = self._commands.qsize()
            idle = self.failed or not self._engine.has_work
            for _ in range(max(waiting, 1) if idle else waiting):
                self._commands.get()()
            if not self.failed and self._engine.has_work:
                try:
                    self._deliver(self._engine.step())
                except Exception:
                    logging.exception("the engine failed")
                    self._fail()

    def _submit(self, job: Job) -> None:
        if self.failed:
            raise EngineFailed
        try:
            for request in job.requests:
                job.ids.append(self._engine.submit(request))
        except Exception as error:
            for request_id in job.ids:
                self._engine.cancel(request_id)
            if not isinstance(error, UserError | Overloaded):
                logging.exception("the engine failed on a request")
            raise
        self._running.update({id: (job, index) for index, id in enumerate(job.ids)})

    def _cancel(self, job: Job, indices: Sequence[int]) -> None:
        for request_id in [job.ids[index] for index in indices if index < len(job.ids)]:
            if self._running.pop(request_id, None) is not None:
                self._engine.cancel(request_id)

    def _deliver(self, outputs: Sequence[Output]) -> None:
        arrived = []
        for output in outputs:
            if output.request_id not in self._running:
                continue  # cancelled
            job, index = self._running[output.request_id]
            if output.finish_reason is not None:
                del self._running[output.request_id]
            arrived.append((job, (index, output)))
        self._event_loop.call_soon_threadsafe(_hand_over, arrived)

    def _fail(self) -> None:
        self.failed = True
        lost = [(job, (index, None)) for job, index in self._running.values()]
        self._running.clear()
        self._event_loop.call_soon_threadsafe(_hand_over, lost)
        self._event_loop.call_soon_threadsafe(self._on_failure)


def _hand_over(arrived: Sequence[tuple[Job, tuple[int, Output | None]]]) -> None:
    for job, item in arrived:
        job.arrived.put_nowait(item)

"""An engine without a model: it says the prompt again, for tests of what lies around an engine."""

import dataclasses
import math
import time
from collections import deque

from dsv3_jax.errors import UserError
from dsv3_jax.serve.requests import Output, Overloaded, Request, TokenLogprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    rows_used: int
    queued: int


@dataclasses.dataclass
class Row:
    request: Request
    said: int = 0


class FakeEngine:
    """Says the tokens of a prompt after its first, then the id that ends a text, again and again.

    Attributes:
      cancelled: how many requests were.
      fails_on: a prompt that holds this token ends with 'error'.
      breaks_on: a step with such a prompt raises.
      refuses: a prompt that holds this token is a UserError.
    """

    def __init__(self, max_rows=4, max_queue=64, tokens_a_step=1, step_seconds=0.0, end=1):
        self.max_rows, self.max_queue, self.end = max_rows, max_queue, end
        self.tokens_a_step, self.step_seconds = tokens_a_step, step_seconds
        self.fails_on = self.breaks_on = self.refuses = None
        self.cancelled = self.steps = self._next = 0
        self._waiting: deque[int] = deque()
        self._rows: dict[int, Row] = {}
        self._requests: dict[int, Request] = {}

    @property
    def has_work(self):
        return bool(self._rows or self._waiting)

    def submit(self, request):
        if self.refuses in request.prompt:
            raise UserError("the prompt holds a token of another vocabulary")
        if len(self._waiting) >= self.max_queue:
            raise Overloaded
        self._next += 1
        self._requests[self._next] = request
        self._waiting.append(self._next)
        return self._next

    def cancel(self, request_id):
        del self._requests[request_id]
        self.cancelled += 1
        if self._rows.pop(request_id, None) is None:
            self._waiting.remove(request_id)

    def statistics(self):
        return Statistics(rows_used=len(self._rows), queued=len(self._waiting))

    def step(self):
        assert self.has_work
        self.steps += 1
        time.sleep(self.step_seconds)
        while self._waiting and len(self._rows) < self.max_rows:
            request_id = self._waiting.popleft()
            self._rows[request_id] = Row(self._requests[request_id])
        outputs = [self._say(request_id, row) for request_id, row in self._rows.items()]
        for output in outputs:
            if output.finish_reason:
                del self._rows[output.request_id], self._requests[output.request_id]
        return outputs

    def _say(self, request_id, row):
        request = row.request
        if self.breaks_on in request.prompt:
            raise RuntimeError("no memory")
        if self.fails_on in request.prompt:
            return Output(request_id=request_id, tokens=(), finish_reason="error")
        cycle = (*request.prompt[1:], self.end)
        tokens, reason = [], None
        while reason is None and len(tokens) < self.tokens_a_step:
            tokens.append(cycle[row.said % len(cycle)])
            row.said += 1
            if tokens[-1] in request.stop_ids:
                reason = "stop"
            elif row.said == request.max_tokens:
                reason = "length"
        logprobs = ()
        if request.num_logprobs is not None:
            top = tuple((token, -1.0 - token) for token in range(request.num_logprobs))
            logprobs = tuple(TokenLogprobs(token=t, logprob=-math.inf, top=top) for t in tokens)
        return Output(
            request_id=request_id, tokens=tuple(tokens), logprobs=logprobs, finish_reason=reason
        )

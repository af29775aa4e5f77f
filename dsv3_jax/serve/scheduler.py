"""Which request is in which row, and what each row does next. Host side, without arrays.

A request waits until a row and the pages for its whole length are free, so that a row that has
started never waits for room. Requests start in the order they came. Rows are dealt out to shards in
blocks; a row's pages are those of its shard.
"""

from collections import deque
from dataclasses import dataclass, field

from dsv3_jax.serve.pages import PagePool
from dsv3_jax.serve.requests import EngineOptions, Overloaded, Request


@dataclass(kw_only=True, eq=False)
class Row:
    """A request at work."""

    request_id: int
    request: Request
    index: int  # among all rows
    shard: int
    pages: list[int]
    tokens: list[int]  # the prompt and the output so far
    num_written: int  # tokens whose latents are in the pages
    drafts: list[int] = field(default_factory=list)  # may follow `tokens`

    @property
    def in_prompt(self) -> bool:
        return self.num_written < len(self.request.prompt)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def limit(self) -> int:
        """Tokens that the model is ever given: all but the last."""
        return len(self.request.prompt) + self.request.max_tokens - 1


class Scheduler:
    """Requests wait in a queue, then hold a row."""

    def __init__(self, options: EngineOptions, num_shards: int):
        self.options, self.num_shards = options, num_shards
        self.rows_per_shard = options.max_rows // num_shards
        self.pages_per_row = -(-options.context_tokens // options.page_tokens)
        per_shard = self.rows_per_shard * self.pages_per_row
        if options.num_pages is not None:
            per_shard = options.num_pages // num_shards
        lookahead = 1 if options.num_draft_tokens else 0
        self.pools = [
            PagePool(per_shard, options.page_tokens, lookahead) for _ in range(num_shards)
        ]
        self.rows: list[Row | None] = [None] * options.max_rows
        self.queue: deque[tuple[int, Request]] = deque()
        self.reused_tokens = 0  # of prompts, found in pages

    def submit(self, request_id: int, request: Request) -> None:
        """Queues a request; raises Overloaded when `max_queue` wait already."""
        if len(self.queue) >= self.options.max_queue:
            raise Overloaded(f"{len(self.queue)} requests wait already")
        self.queue.append((request_id, request))

    def admit(self) -> list[Row]:
        """Moves requests into free rows, in order, as long as there is room."""
        started = []
        while self.queue:
            row = self.place(*self.queue[0], shared=self.options.prefix_reuse)
            if row is None:
                break
            self.queue.popleft()
            started.append(row)
        return started

    def withdraw(self, request_id: int) -> bool:
        """Takes a request out of the queue or out of its row; False: it is in neither."""
        for waiting in self.queue:
            if waiting[0] == request_id:
                self.queue.remove(waiting)
                return True
        row = self.find(request_id)
        if row is not None:
            self.finish(row)
        return row is not None

    def find(self, request_id: int) -> Row | None:
        """The row of a request, None if it has none."""
        return next((r for r in self.rows if r is not None and r.request_id == request_id), None)

    def finish(self, row: Row, *, keep: bool = True) -> None:
        """Frees a row and its pages; with `keep`, later rows may reuse what is in them."""
        if keep:
            self.register(row)
        self.pools[row.shard].release(row.pages)
        self.rows[row.index] = None

    def register(self, row: Row) -> None:
        """Offers the full pages of a row to others."""
        if self.options.prefix_reuse:
            self.pools[row.shard].register(row.tokens, row.pages, row.num_written)

    def next_prompts(self) -> dict[int, Row]:
        """Rows whose prompts go on, those that have waited longest, by place in the program.

        A shard has `prefill_rows` places.
        """
        per_shard = self.options.prefill_rows
        waiting = [row for row in self.rows if row is not None and row.in_prompt]
        taken = [0] * self.num_shards
        places = {}
        for row in sorted(waiting, key=lambda row: row.request_id):
            if taken[row.shard] < per_shard:
                places[row.shard * per_shard + taken[row.shard]] = row
                taken[row.shard] += 1
        return places

    def decoding(self) -> list[Row]:
        """The rows past their prompts."""
        return [row for row in self.rows if row is not None and not row.in_prompt]

    def pages_needed(self, request: Request) -> int:
        """Of the tokens that the model is given."""
        return -(-(len(request.prompt) + request.max_tokens - 1) // self.options.page_tokens)

    def place(self, request_id: int, request: Request, shared: bool) -> Row | None:
        """Gives a request a row and pages, on the shard that knows most of its prompt.

        Args:
          shared: whether it may take over pages of others; else all are its own.

        Returns:
          The row; None: there is no room now.
        """
        choices = []
        for shard, pool in enumerate(self.pools):
            first = shard * self.rows_per_shard
            free = [i for i in range(first, first + self.rows_per_shard) if self.rows[i] is None]
            if free:
                known = pool.match(request.prompt) if shared else []
                choices.append((len(known), pool.num_available, -shard, free[0], known))
        needed = self.pages_needed(request)
        for _, _, minus_shard, index, known in sorted(choices, reverse=True):
            pages = self.pools[-minus_shard].allocate(needed - len(known), known)
            if pages is not None:
                reused = len(known) * self.options.page_tokens
                self.reused_tokens += reused
                self.rows[index] = Row(
                    request_id=request_id,
                    request=request,
                    index=index,
                    shard=-minus_shard,
                    pages=pages,
                    tokens=list(request.prompt),
                    num_written=reused,
                )
                return self.rows[index]
        return None

"""The engine: requests in, tokens out, a step at a time (spec §11).

A step takes in a chunk of one or more prompts a shard, then decodes every row past its prompt.
Both are programs of one shape (`programs.py`); the host decides what is in them (`scheduler.py`).
One engine may compute prompts and another the outputs: `export` hands a row over, `admit` takes it.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.errors import UserError
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.serve import batches, programs
from dsv3_jax.serve.balance import Balancer
from dsv3_jax.serve.checks import check_options, check_request, check_tensor
from dsv3_jax.serve.programs import Caches, StepOutputs
from dsv3_jax.serve.requests import EngineOptions, Output, Overloaded, Request
from dsv3_jax.serve.sampling import rows_of
from dsv3_jax.serve.scheduler import Row, Scheduler


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of an engine since it started, but for what is there now."""

    rows_used: int  # now
    queued: int  # now
    pages_used: int  # now, shared ones once
    num_pages: int
    reused_tokens: int  # prompt tokens found in the cache
    prefilled_tokens: int  # prompt tokens computed
    decoded_tokens: int  # tokens put out
    decode_passes: int  # of one row each
    drafts_proposed: int
    drafts_accepted: int
    rebalances: int  # placements of experts that changed
    expert_load: np.ndarray  # int64 [MoE layers, E], tokens sent to each expert; MTP last


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A row on its way from one engine to another: its text and its pages, in host memory."""

    request: Request
    tokens: tuple[int, ...]  # the prompt and the output so far
    drafts: tuple[int, ...]
    config: ModelConfig
    page_tokens: int
    cache_dtype: str
    caches: Caches  # numpy [layers, pages, ...]


class Engine:
    """Serves one model. For one thread.

    Args:
      model: of any mesh `data` x `expert`; its rows and pages are split over both. A mesh with an
        axis `tensor` (`serving_mesh`) also splits heads, over devices with the same rows.
      options: sizes and formats.

    Raises:
      UserError: options that the model or its mesh do not allow.
    """

    def __init__(self, model: DeepSeekV3, options: EngineOptions):
        mesh = model.runtime.mesh
        num_shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]
        check_options(options, model.config, num_shards)
        if (tensor := model.runtime.num_tensor_shards) > 1:
            fp8 = any(leaf.dtype == jnp.float8_e4m3fn for leaf in jax.tree.leaves(nnx.state(model)))
            check_tensor(model.config, mesh.shape["expert"], tensor, fp8=fp8)
        self.config, self.options, self._mesh = model.config, options, mesh
        self._scheduler = Scheduler(options, num_shards)
        on_gpu, model = model.runtime.platform == "gpu", programs.placed(model)
        self._balancer = None
        if options.redundant_experts or options.rebalance_steps:
            self._balancer = Balancer(model, options)
            model = self._balancer.model
        elif options.layers_apart or (options.layers_apart is None and on_gpu):
            model = programs.layers_apart(model)
        self._use(model)
        pages_per_shard = self._scheduler.pools[0].num_pages
        self._state = programs.new_state(model.config, options, pages_per_shard, mesh)
        devices = jax.tree.leaves(self._weights)[0].devices()
        if len(devices) == 1:  # bound to it, as what the programs return: one compilation for both
            self._state = jax.device_put(self._state, *devices)
        self._next_id = 0
        self._cancelled: list[int] = []
        self._steps = self._rebalances = self._prefilled = self._decoded = 0
        self._passes = self._proposed = self._accepted = 0

    def submit(self, request: Request) -> int:
        """Queues a request and returns its number.

        Raises:
          UserError: the request cannot be served.
          Overloaded: the queue is full.
        """
        check_request(request, self.config, self.options)
        needed, pool = self._scheduler.pages_needed(request), self._scheduler.pools[0]
        if needed > pool.num_pages:
            raise UserError(
                f"prompt and max_tokens={request.max_tokens} need {needed} pages of "
                f"{self.options.page_tokens} tokens; this engine has {pool.num_pages} for a "
                "request: lower max_tokens or raise num_pages"
            )
        self._scheduler.submit(self._next_id, request)
        return self._new_id()

    def cancel(self, request_id: int) -> None:
        """Ends a request now; the next step says 'cancelled'. One that has ended: no effect."""
        if self._scheduler.withdraw(request_id):
            self._cancelled.append(request_id)

    @property
    def has_work(self) -> bool:
        """Whether a step would do or report anything."""
        return bool(self._cancelled or self._scheduler.queue or any(self._scheduler.rows))

    def step(self) -> list[Output]:
        """A chunk of some prompts and one pass of decoding; what came out, by request."""
        outputs = [
            Output(request_id=request_id, tokens=(), finish_reason="cancelled")
            for request_id in self._cancelled
        ]
        self._cancelled = []
        for row in self._scheduler.admit():
            self._set_row(row)
        prompts, decoding = self._scheduler.next_prompts(), self._scheduler.decoding()
        prompted = decoded = None  # both programs are started before either is waited for
        if prompts:
            inputs = batches.prefill_inputs(prompts, self._scheduler)
            prompted, self._state = programs.prefill(
                self._weights, self._state, inputs, **self._static
            )
        if decoding:
            inputs = batches.decode_inputs(decoding, self._scheduler)
            decoded, self._state = programs.decode(
                self._weights, self._state, inputs, **self._static
            )
        prompted, decoded = jax.device_get((prompted, decoded))
        for at, row in prompts.items():
            outputs += self._take_prompt(row, prompted, at)
        for row in decoding:
            outputs += self._take_decoded(row, decoded)
        self._steps += 1
        if self.options.rebalance_steps and self._steps % self.options.rebalance_steps == 0:
            if self._balancer.rebalance(self._expert_load()):
                self._rebalances += 1
                self._use(self._balancer.model)
        return outputs

    def statistics(self) -> Statistics:
        """Counters; waits for the step in progress."""
        pools = self._scheduler.pools
        return Statistics(
            rows_used=sum(row is not None for row in self._scheduler.rows),
            queued=len(self._scheduler.queue),
            pages_used=sum(pool.num_held for pool in pools),
            num_pages=sum(pool.num_pages for pool in pools),
            reused_tokens=self._scheduler.reused_tokens,
            prefilled_tokens=self._prefilled,
            decoded_tokens=self._decoded,
            decode_passes=self._passes,
            drafts_proposed=self._proposed,
            drafts_accepted=self._accepted,
            rebalances=self._rebalances,
            expert_load=self._expert_load(),
        )

    def export(self, request_id: int) -> Exported:
        """Takes a request past its prompt out of this engine; it reports nothing more of it.

        Raises:
          UserError: no such request is past its prompt.
        """
        row = self._scheduler.find(request_id)
        if row is None or row.in_prompt:
            raise UserError(f"request {request_id} is not past its prompt here; export it later")
        pages_SZ = batches.pages_of_shard(row.pages, row.shard, self._scheduler)
        caches = programs.read_pages(self._state.caches, pages_SZ, mesh=self._mesh)
        caches = jax.device_get(jax.tree.map(lambda x: x[row.shard], caches))
        exported = Exported(
            request=row.request,
            tokens=tuple(row.tokens),
            drafts=tuple(row.drafts),
            config=self.config,
            page_tokens=self.options.page_tokens,
            cache_dtype=self.options.cache_dtype,
            caches=jax.tree.map(lambda x: x[:, : len(row.pages)], caches),
        )
        self._scheduler.finish(row)
        return exported

    def admit(self, exported: Exported) -> int:
        """Goes on with a request of another engine; returns its number here.

        Raises:
          UserError: the other engine has another model, page size, format or number of drafts.
          Overloaded: no row is free, or too few pages.
        """
        check_request(exported.request, self.config, self.options)
        for name in ("page_tokens", "cache_dtype"):
            theirs, ours = getattr(exported, name), getattr(self.options, name)
            if theirs != ours:
                raise UserError(f"{name} is {theirs} there and {ours} here; make them equal")
        if exported.config != self.config:
            raise UserError("the request comes from an engine with another model; serve the same")
        if len(exported.drafts) != self.options.num_draft_tokens:
            raise UserError(
                f"num_draft_tokens is {len(exported.drafts)} there and "
                f"{self.options.num_draft_tokens} here; make them equal"
            )
        row = self._scheduler.place(self._next_id, exported.request, shared=False)
        if row is None:
            raise Overloaded("no row is free, or too few pages")
        row.tokens, row.drafts = list(exported.tokens), list(exported.drafts)
        row.num_written = len(row.tokens) - 1
        self._set_row(row)
        missing = self._scheduler.pages_per_row - len(row.pages)

        def padded(x: np.ndarray) -> np.ndarray:
            return np.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

        pages_SZ = batches.pages_of_shard(row.pages, row.shard, self._scheduler)
        contents = jax.tree.map(padded, exported.caches)
        caches = programs.write_pages(self._state.caches, pages_SZ, contents, mesh=self._mesh)
        self._state = self._state._replace(caches=caches)
        return self._new_id()

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _use(self, model: DeepSeekV3) -> None:
        graphdef, self._weights = programs.split_model(model)
        self._static: dict[str, Any] = dict(
            graphdef=graphdef, mesh=self._mesh, num_drafts=self.options.num_draft_tokens
        )

    def _set_row(self, row: Row) -> None:
        """Gives a row the settings of its request."""
        prompt, vocab = row.request.prompt, self.config.vocab_size
        settings = rows_of([row.request.sampling], vocab, [prompt])
        counts_V = np.bincount(np.array(row.tokens[len(prompt) :], int), minlength=vocab)
        settings = settings._replace(output_counts_BV=counts_V[None].astype(np.int32))
        rows_per_shard = self._scheduler.rows_per_shard
        index_S = np.full(self._scheduler.num_shards, rows_per_shard, np.int32)
        index_S[row.shard] = row.index % rows_per_shard
        self._state = programs.set_row(self._state, index_S, settings, mesh=self._mesh)

    def _take_prompt(self, row: Row, result: StepOutputs, at: int) -> list[Output]:
        count = min(self.options.prefill_chunk, len(row.request.prompt) - row.num_written)
        self._prefilled += count
        row.num_written += count
        outputs = self._take(row, result, at)
        if self._scheduler.rows[row.index] is row:
            self._scheduler.register(row)
        return outputs

    def _take_decoded(self, row: Row, result: StepOutputs) -> list[Output]:
        count = int(result.count_B[row.index])
        row.num_written += count
        self._passes += 1
        self._proposed += min(self.options.num_draft_tokens, row.limit - len(row.tokens))
        self._accepted += count - 1
        return self._take(row, result, row.index)

    def _take(self, row: Row, result: StepOutputs, at: int) -> list[Output]:
        """Adds what is at `at` in a result to a row, and frees the row if that ends it."""
        request, count = row.request, int(result.count_B[at])
        if count and not result.finite_B[at]:
            self._scheduler.finish(row, keep=False)
            return [Output(request_id=row.request_id, tokens=(), finish_reason="error")]
        row.drafts = result.drafts_BK[at].tolist()
        new, reason = [], None
        for token in result.tokens_BT[at, :count].tolist():
            new.append(token)
            if token in request.stop_ids:
                reason = "stop"
            elif row.num_output + len(new) == request.max_tokens:
                reason = "length"
            if reason:
                break
        row.tokens += new
        self._decoded += len(new)
        if reason:
            row.num_written = min(row.num_written, len(row.tokens) - 1)  # drafts after the end
            self._scheduler.finish(row)
        if not new:
            return []
        wanted = request.num_logprobs
        logprobs = () if wanted is None else batches.token_logprobs(result, at, new, wanted)
        return [
            Output(
                request_id=row.request_id,
                tokens=tuple(new),
                logprobs=logprobs,
                finish_reason=reason,
            )
        ]

    def _expert_load(self) -> np.ndarray:
        return np.asarray(self._state.load_SLE, np.int64).sum(0)

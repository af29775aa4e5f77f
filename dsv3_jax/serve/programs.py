"""The programs of an engine: a chunk of some prompts, and one step of decoding.

Each has one shape for good. On a mesh every device runs them on rows of its own, with their pages,
inside one `shard_map` over `data` x `expert`; only the experts of a layer exchange tokens. Devices
along `tensor` share rows and pages: each has some of the heads, and sends some of the tokens on.
Shape letters: B rows, T new tokens a row, Z pages, D width, V vocabulary, K drafts, C most likely
tokens that are reported, S shards, L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import rope
from dsv3_jax.model.moe import ReplicaTable
from dsv3_jax.model.paged_cache import PagedCache, Paging
from dsv3_jax.model.router import RouterBias
from dsv3_jax.model.runtime import Runtime
from dsv3_jax.model.transformer import DeepSeekV3
from dsv3_jax.parallel.mesh import BATCH_AXES, expert_axes
from dsv3_jax.parallel.pipeline.split import in_halves
from dsv3_jax.serve import sampling
from dsv3_jax.serve.requests import EngineOptions, Sampling
from dsv3_jax.serve.sampling import SamplingRows
from dsv3_jax.serve.speculative import draft, verify

MAX_LOGPROBS = 20  # most likely tokens that a request may ask for
Caches = dict[str, PagedCache]  # of each stack of blocks, and 'mtp'
_ROWS = PartitionSpec(BATCH_AXES)
_PAGES = PartitionSpec(None, BATCH_AXES)


class State(NamedTuple):
    """What stays on the devices from step to step; the programs take it and give it back."""

    caches: Caches  # pages are split over shards
    rows: SamplingRows
    load_SLE: jax.Array  # int32, tokens sent to each expert so far


STATE_SPECS = State(caches=_PAGES, rows=_ROWS, load_SLE=_ROWS)


class PrefillInputs(NamedTuple):
    """A chunk of each of a few prompts."""

    tokens_BT: jax.Array  # int32 [B, T + 1]: one more than the chunk, if the prompt has it
    position_B: jax.Array  # int32, of the chunk's first token
    count_B: jax.Array  # int32 tokens of the chunk; 0: nothing to do
    last_B: jax.Array  # bool, does the prompt end here?
    limit_B: jax.Array  # int32, positions from this on are never computed
    row_B: jax.Array  # int32, where among its shard's rows its settings are
    pages_BZ: jax.Array
    logprobs_B: jax.Array  # bool, are they asked for?


class DecodeInputs(NamedTuple):
    """All rows."""

    tokens_BT: jax.Array  # int32 [B, 1 + K], the last token of each row, then its drafts
    position_B: jax.Array  # int32, of that last token
    limit_B: jax.Array  # int32, as above; 0: an idle row
    pages_BZ: jax.Array
    logprobs_B: jax.Array


class StepOutputs(NamedTuple):
    """What a step adds to its rows."""

    tokens_BT: jax.Array  # int32 new tokens
    count_B: jax.Array  # int32, how many of them count
    drafts_BK: jax.Array  # int32, for the next step
    finite_B: jax.Array  # bool, False: the model's logits are not numbers
    logprobs_BT: jax.Array  # float32, of the new tokens
    top_ids_BTC: jax.Array
    top_logprobs_BTC: jax.Array


def split_model(model: DeepSeekV3) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """The graph of what one device runs, and the model's weights (the same arrays)."""
    graphdef, weights = _split(model)
    if (mesh := model.runtime.mesh) is None:
        return graphdef, weights
    local = _merged(graphdef, weights)
    for _, node in nnx.iter_graph(local):
        if isinstance(getattr(node, "runtime", None), Runtime):
            node.runtime = replace(node.runtime, mesh=None, shard_of=mesh)
    return _split(local)[0], weights


def placed(model: DeepSeekV3) -> DeepSeekV3:
    """The model with its weights where serving wants them; those that are there are not copied."""
    if (mesh := model.runtime.mesh) is None:
        return model
    graphdef, weights = _split(model)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), weight_specs(weights, mesh))
    return _merged(graphdef, jax.device_put(weights, shardings))


def layers_apart(model: DeepSeekV3) -> DeepSeekV3:
    """A copy of the model with a list of blocks in place of each stack, which the programs unroll.

    A GPU's kernels take whole arrays, so a loop over a stack would copy each layer's weights first,
    in every step. The program is as many times longer as there are layers.
    """
    model = nnx.clone(model)
    for name in ("dense_blocks", "moe_blocks"):
        if (stack := getattr(model, name)) is not None:
            graphdef, weights = nnx.split(stack)
            layers = jax.jit(_unstacked)(weights)
            setattr(model, name, nnx.List([nnx.merge(graphdef, layer) for layer in layers]))
    return model


def _unstacked(weights) -> list:
    num_layers = len(jax.tree.leaves(weights)[0])
    return [jax.tree.map(lambda x, i=i: x[i], weights) for i in range(num_layers)]


def new_state(
    config: ModelConfig, options: EngineOptions, pages_per_shard: int, mesh: Mesh | None
) -> State:
    """Empty caches, with a trash page more a shard, and rows without requests."""
    num_shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["expert"]
    layers = {"dense_blocks": config.num_dense_layers, "moe_blocks": config.num_moe_layers}
    layers["mtp"] = 1 if options.num_draft_tokens else 0
    num_pages = num_shards * (pages_per_shard + 1)

    def make() -> State:
        caches = {
            name: PagedCache.zeros(
                *(count, num_pages, options.page_tokens),
                *(config.kv_latent_dim, config.qk_rope_head_dim, options.cache_dtype),
            )
            for name, count in layers.items()
            if count
        }
        rows = sampling.rows_of([Sampling()] * options.max_rows, config.vocab_size)
        num_moe_layers = layers["moe_blocks"] + layers["mtp"]
        load_SLE = jnp.zeros((num_shards, num_moe_layers, config.num_experts), jnp.int32)
        return State(caches, jax.tree.map(jnp.asarray, rows), load_SLE)

    if mesh is None:
        return jax.jit(make)()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), STATE_SPECS)
    return jax.jit(make, out_shardings=shardings)()


def _split(model: DeepSeekV3) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graphdef, *states = nnx.split(model, nnx.Param, RouterBias, ReplicaTable)
    names = "params", "bias", "replicas"
    return graphdef, dict(zip(names, map(nnx.to_pure_dict, states), strict=True))


def weight_specs(weights, mesh: Mesh) -> Any:
    """Routed experts over `expert` and `tensor`, heads over `tensor`, the rest on every device."""

    def spec(path, _):
        keys = {entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)}
        stack = () if any(isinstance(key, int) for key in keys) else (None,)  # or a layer apart
        if "experts" in keys:
            return PartitionSpec(*stack, expert_axes(mesh))
        if "tensor" in mesh.axis_names and keys & {"wq", "wq_b", "wkv_b"}:
            return PartitionSpec(*stack, None, "tensor")
        if "tensor" in mesh.axis_names and "wo" in keys:
            return PartitionSpec(*stack, "tensor")
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec, weights)


def _on_shards(function: Callable, mesh: Mesh | None, weights, state: State, inputs: NamedTuple):
    if mesh is None:
        return function(weights, state, inputs)
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(weight_specs(weights, mesh), STATE_SPECS, _ROWS),
        out_specs=(_ROWS, STATE_SPECS),
        check_vma=False,
    )(weights, state, inputs)


@partial(jax.jit, static_argnames=("graphdef", "mesh", "num_drafts"), donate_argnames="state")
def prefill(
    weights, state: State, inputs: PrefillInputs, *, graphdef, mesh: Mesh | None, num_drafts: int
) -> tuple[StepOutputs, State]:
    """Runs a chunk of each prompt; where it ends, the first new token (T = 1) and its drafts."""

    def on_shard(weights, state: State, inputs: PrefillInputs):
        model = _merged(graphdef, weights)
        step_T = jnp.arange(inputs.tokens_BT.shape[1] - 1)
        paging = Paging(
            inputs.pages_BZ, inputs.position_B[:, None] + step_T, step_T < inputs.count_B[:, None]
        )
        x_BTD, main_BTD, caches, load_LE = _run_blocks(
            model, inputs.tokens_BT[:, :-1], state.caches, paging, absorbed=False
        )
        end_B = jnp.maximum(inputs.count_B - 1, 0)
        logits_BV = model.logits(main_BTD[jnp.arange(len(end_B)), end_B])
        # The token after the prompt is verified like one after the last token without drafts.
        ends = Paging(inputs.pages_BZ, (inputs.position_B + end_B)[:, None], inputs.last_B[:, None])
        rows = jax.tree.map(lambda x: x[inputs.row_B], state.rows)
        new_B1, count_B, rows = verify(logits_BV[:, None], inputs.tokens_BT[:, :1], ends, rows)
        counts_BV = state.rows.output_counts_BV.at[inputs.row_B, new_B1[:, 0]].add(count_B)
        drafts_BK = jnp.zeros((len(end_B), 0), jnp.int32)
        if num_drafts:
            is_end_BT = inputs.last_B[:, None] & (step_T == end_B[:, None])
            drafts_BK, caches["mtp"], load_E = draft(
                model,
                main_BTD if model.config.mtp_hidden == "post_norm" else x_BTD,
                jnp.where(is_end_BT, new_B1, inputs.tokens_BT[:, 1:]),
                caches["mtp"],
                paging,
                inputs.limit_B,
                rows,
                num_drafts=num_drafts,
                absorbed=False,
            )
            load_LE = jnp.concatenate([load_LE, load_E[None]])
        outputs = _outputs(logits_BV[:, None], new_B1, count_B, drafts_BK, inputs.logprobs_B)
        rows = state.rows._replace(output_counts_BV=counts_BV)
        return outputs, State(caches, rows, state.load_SLE + load_LE.astype(jnp.int32))

    return _on_shards(on_shard, mesh, weights, state, inputs)


@partial(jax.jit, static_argnames=("graphdef", "mesh", "num_drafts"), donate_argnames="state")
def decode(
    weights, state: State, inputs: DecodeInputs, *, graphdef, mesh: Mesh | None, num_drafts: int
) -> tuple[StepOutputs, State]:
    """Runs the last token of every row with its drafts: 1..1 + K new tokens, and new drafts."""

    def on_shard(weights, state: State, inputs: DecodeInputs):
        model = _merged(graphdef, weights)
        position_BT = inputs.position_B[:, None] + jnp.arange(1 + num_drafts)
        paging = Paging(inputs.pages_BZ, position_BT, position_BT < inputs.limit_B[:, None])
        x_BTD, main_BTD, caches, load_LE = _run_blocks(
            model, inputs.tokens_BT, state.caches, paging, absorbed=True
        )
        logits_BTV = model.logits(main_BTD)
        new_BT, count_B, rows = verify(logits_BTV, inputs.tokens_BT, paging, state.rows)
        drafts_BK = jnp.zeros((len(count_B), 0), jnp.int32)
        if num_drafts:
            accepted_BT = jnp.arange(1 + num_drafts) < count_B[:, None]
            drafts_BK, caches["mtp"], load_E = draft(
                model,
                main_BTD if model.config.mtp_hidden == "post_norm" else x_BTD,
                new_BT,
                caches["mtp"],
                paging._replace(mask_BT=accepted_BT),
                inputs.limit_B,
                rows,
                num_drafts=num_drafts,
                absorbed=True,
            )
            load_LE = jnp.concatenate([load_LE, load_E[None]])
        outputs = _outputs(logits_BTV, new_BT, count_B, drafts_BK, inputs.logprobs_B)
        return outputs, State(caches, rows, state.load_SLE + load_LE.astype(jnp.int32))

    return _on_shards(on_shard, mesh, weights, state, inputs)


@partial(jax.jit, static_argnames="mesh", donate_argnames="state")
def set_row(state: State, index_S: jax.Array, row: SamplingRows, *, mesh: Mesh | None) -> State:
    """Puts the settings of one request into a row.

    Args:
      index_S: int32, the row's place in its shard; for every other shard, past its last row.
      row: one row.
    """

    def on_shard(rows, index_S, row):
        return sampling.replaced(rows, index_S[0], row)

    if mesh is not None:
        in_specs = _ROWS, _ROWS, PartitionSpec()
        on_shard = jax.shard_map(
            on_shard, mesh=mesh, in_specs=in_specs, out_specs=_ROWS, check_vma=False
        )
    return state._replace(rows=on_shard(state.rows, index_S, row))


@partial(jax.jit, static_argnames="mesh")
def read_pages(caches: Caches, pages_SZ: jax.Array, *, mesh: Mesh | None) -> Caches:
    """The contents of some pages of every shard: [S, layers, Z, ...]."""

    def on_shard(caches, pages_SZ):
        return jax.tree.map(lambda x: x[:, pages_SZ[0]][None], caches)

    if mesh is not None:
        in_specs = _PAGES, _ROWS
        on_shard = jax.shard_map(
            on_shard, mesh=mesh, in_specs=in_specs, out_specs=_ROWS, check_vma=False
        )
    return on_shard(caches, pages_SZ)


@partial(jax.jit, static_argnames="mesh", donate_argnames="caches")
def write_pages(
    caches: Caches, pages_SZ: jax.Array, contents: Caches, *, mesh: Mesh | None
) -> Caches:
    """Writes the same contents, [layers, Z, ...], into pages of every shard; 0: the trash page."""

    def on_shard(caches, pages_SZ, contents):
        def write(x, new):
            return x.at[:, pages_SZ[0]].set(new)

        return jax.tree.map(write, caches, contents)

    if mesh is not None:
        in_specs = _PAGES, _ROWS, PartitionSpec()
        on_shard = jax.shard_map(
            on_shard, mesh=mesh, in_specs=in_specs, out_specs=_PAGES, check_vma=False
        )
    return on_shard(caches, pages_SZ, contents)


def _merged(graphdef, weights) -> DeepSeekV3:
    return nnx.merge(graphdef, weights["params"], weights["bias"], weights["replicas"])


def _run_blocks(model: DeepSeekV3, tokens_BT, caches, paging: Paging, *, absorbed: bool):
    """The last block's output, the same after the final norm, the caches, and load_LE."""
    caches, loads = dict(caches), []
    rows = _Rows(model.embedded(tokens_BT), paging, rope.cos_sin(paging.position_BT, model.config))
    is_halved = not (absorbed or len(tokens_BT) % 2) and model.runtime.num_expert_shards > 1

    def layer(carry, inputs):
        (x_BTD, cache), (index, block) = carry, inputs
        cache = block.written(x_BTD, cache, index, *rows[1:])

        def rest(rows: _Rows):
            y_BTD, stats = block.after_writing(
                rows.x_BTD, cache, index, rows.paging, cos_sin=rows.cos_sin, absorbed=absorbed
            )
            return y_BTD, None if stats is None else stats.counts_E

        now = rows._replace(x_BTD=x_BTD)
        if not (is_halved and block.moe):
            y_BTD, counts_E = rest(now)
            return (y_BTD, cache), counts_E
        y_BTD, counts_2E = map(jnp.stack, zip(*in_halves(rest, *_halves(now)), strict=True))
        return (y_BTD.reshape(x_BTD.shape), cache), counts_2E.sum(0)

    x_BTD = rows.x_BTD
    for name in ("dense_blocks", "moe_blocks"):
        blocks = getattr(model, name)
        if blocks is not None:
            run = _one_by_one if isinstance(blocks, nnx.List) else _scan
            (x_BTD, caches[name]), load_LE = run(layer, (x_BTD, caches[name]), blocks)
            if load_LE is not None:
                loads.append(load_LE)
    load_LE = jnp.concatenate(loads) if loads else jnp.zeros((0, model.config.num_experts))
    return x_BTD, model.final_norm(x_BTD), caches, load_LE


class _Rows(NamedTuple):
    """What a block is told of its rows."""

    x_BTD: jax.Array
    paging: Paging
    cos_sin: rope.CosSin


def _halves(rows: _Rows) -> tuple[_Rows, _Rows]:
    middle = len(rows.x_BTD) // 2
    return jax.tree.map(lambda x: x[:middle], rows), jax.tree.map(lambda x: x[middle:], rows)


def _scan(layer: Callable, carry, blocks) -> tuple[Any, jax.Array | None]:
    """Runs a stack of blocks: what is carried, and their loads."""
    graphdef, stack = nnx.split(blocks)
    num_layers = len(jax.tree.leaves(stack)[0])

    def one(carry, inputs):
        index, weights = inputs
        return layer(carry, (index, nnx.merge(graphdef, weights)))

    return jax.lax.scan(one, carry, (jnp.arange(num_layers), stack))


def _one_by_one(layer: Callable, carry, blocks) -> tuple[Any, jax.Array | None]:
    """As `_scan`, of a list of blocks."""
    loads = []
    for index, block in enumerate(blocks):
        carry, load_E = layer(carry, (index, block))
        loads.append(load_E)
    return carry, None if loads[0] is None else jnp.stack(loads)


def _outputs(logits_BTV, new_BT, count_B, drafts_BK, logprobs_B) -> StepOutputs:
    rows, num_tokens, vocab = logits_BTV.shape
    num_top = min(MAX_LOGPROBS, vocab)

    def compute():
        logprob, ids, top = sampling.logprobs(
            logits_BTV.reshape(-1, vocab), new_BT.reshape(-1), num_top
        )
        shape = rows, num_tokens
        return logprob.reshape(shape), ids.reshape(*shape, -1), top.reshape(*shape, -1)

    def leave_out():
        tops = rows, num_tokens, num_top
        return jnp.zeros((rows, num_tokens)), jnp.zeros(tops, jnp.int32), jnp.zeros(tops)

    counts_BT = jnp.arange(num_tokens) < count_B[:, None]
    finite_BT = jnp.isfinite(logits_BTV).all(-1)
    return StepOutputs(
        new_BT,
        count_B,
        drafts_BK,
        jnp.all(finite_BT | ~counts_BT, axis=1),
        *jax.lax.cond(logprobs_B.any(), compute, leave_out),
    )

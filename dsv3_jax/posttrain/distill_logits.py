"""Logit distillation: a student learns its teacher's next-token distribution, not its texts alone.

    L = (1 - a) L_main + a tau^2 mean_t KL(p_t || q_t) + lambda L_MTP + L_bal

p and q are softmax(logits / tau) of teacher and student at the positions whose next token counts,
and a is `distill.weight`. V3 distils texts (spec §10.4, `distill.py`); this is the second way. KL
is over the whole vocabulary, or over the teacher's K most probable tokens and the rest as one:
never more than the full one, and equal to it where all the others keep their proportions.

The frozen teacher runs before the step, on the same mesh, and leaves its distribution in the batch:
4 V bytes a token, or 8 K + 4 with `distill.top_k`.
Shape letters: A micro-batches, B rows, T tokens, V vocabulary, K tokens kept, D width.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint.pretrained import (
    load_model,
    load_run_tokenizer,
    read_model,
    tokenizer_file,
)
from dsv3_jax.config import BalanceConfig, Config, DistillConfig
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.errors import UserError
from dsv3_jax.parallel.context import token_spec
from dsv3_jax.parallel.mesh import batch_sharding
from dsv3_jax.train.losses import (
    LOGITS_BUDGET,
    balance_loss,
    input_segments,
    num_targets,
    position_targets,
    token_losses,
)

Batch = dict[str, jax.Array]


def checked(config: Config) -> Config:
    """The config with the teacher's tokenizer; looks at headers, before anything is allocated.

    Raises:
      UserError: `config` leaves nothing to distil, or teacher and student have other tokens.
    """
    distill = config.distill
    if not distill.teacher:
        raise UserError(
            "distill.teacher is empty; name the run or folder to learn from, e.g. "
            "--set distill.teacher=runs/teacher"
        )
    if config.parallel.pipe > 1:
        raise UserError(
            f"parallel.pipe={config.parallel.pipe} has a loss of its own, without a teacher; use "
            f"parallel.pipe=1"
        )
    vocabulary, own = read_model(distill.teacher).vocab_size, config.model.vocab_size
    if vocabulary != own:
        raise UserError(
            f"the teacher {distill.teacher} has {vocabulary} tokens and the student "
            f"model.vocab_size={own}; both must have the same"
        )
    if distill.top_k >= own:
        raise UserError(
            f"distill.top_k={distill.top_k} is not less than model.vocab_size={own}; use 0 for all"
        )
    tokenizer = load_run_tokenizer(distill.teacher)
    if config.sft.conversations:
        student = config.checkpoint.initial_weights
        theirs = load_run_tokenizer(student) if student else tokenizer
    elif config.data.prepared or config.data.tokenizer != "train":
        student = config.data.prepared or config.data.tokenizer
        theirs = load_tokenizer(student)
    else:
        data = replace(config.data, tokenizer=str(tokenizer_file(distill.teacher)))
        return replace(config, data=data)
    if theirs.tokens() != tokenizer.tokens():
        raise UserError(
            f"the tokenizers of {student} and of the teacher {distill.teacher} differ; both models "
            f"must have the same tokens"
        )
    return config


class Teacher:
    """Adds its distribution to batches: `teacher(batch)`, the `prepare` of `train.loop.train`."""

    def __init__(self, config: Config, mesh: Mesh):
        """Loads `distill.teacher`, in the compute dtype, over the mesh."""
        dtype = jnp.dtype(config.precision.compute)
        self._graphdef, self._state = nnx.split(load_model(config.distill.teacher, dtype, mesh))
        self._distributions = jax.jit(
            partial(distributions, self._graphdef, config.distill),
            out_shardings=batch_sharding(mesh, leading=1),
        )

    def __call__(self, batch: Batch) -> Batch:
        """`batch` [A, B, ...] with what `distill_losses` reads of the teacher."""
        texts = {name: batch[name] for name in ("tokens", "segments") if name in batch}
        return batch | self._distributions(self._state, texts)


def distributions(
    graphdef: nnx.GraphDef, config: DistillConfig, state: Any, batches: Batch
) -> Batch:
    """Log-probabilities of the teacher after each input token, float32.

    Args:
      batches: "tokens" (and "segments") int32 [A, B, T+1].

    Returns:
      "teacher_logprobs" [A, B, T, V]; with `top_k` [A, B, T, K] of "teacher_tokens" int32, and
      "teacher_rest" [A, B, T]: that of all other tokens together.
    """
    model = nnx.merge(graphdef, state)

    def of_token(head_DV, hidden_D):
        logprobs_V = _logprobs(head_DV, hidden_D, model.runtime.compute_dtype, config.temperature)
        if not config.top_k:
            return {"teacher_logprobs": logprobs_V}
        kept_K, tokens_K = jax.lax.top_k(logprobs_V, config.top_k)
        rest = jax.nn.logsumexp(logprobs_V.at[tokens_K].set(-jnp.inf))
        return {"teacher_logprobs": kept_K, "teacher_tokens": tokens_K, "teacher_rest": rest}

    def of_microbatch(batch):
        hidden_BTD, _, _ = model.hidden_states(
            batch["tokens"][:, :-1], segments_BT=input_segments(batch), mtp=False
        )
        return _each_token(of_token, model, hidden_BTD)

    return jax.lax.map(of_microbatch, batches)


class DistillLosses(NamedTuple):
    """`Losses`, and the mean KL of the teacher's distribution to the student's, nats, at tau."""

    total: jax.Array
    main: jax.Array
    mtp: jax.Array
    balance: jax.Array
    overflow: jax.Array
    kl: jax.Array


def distill_losses(
    model,
    batch: Batch,
    balance: BalanceConfig,
    mtp_weight: jax.Array | float,
    *,
    config: DistillConfig,
) -> tuple[DistillLosses, jax.Array]:
    """Losses of one micro-batch, as `losses.model_losses`, that follow the teacher too.

    Args:
      batch: as `model_losses` reads, with what `distributions` gives of it.

    Returns:
      The losses, and counts_E of every MoE layer, stacked: tokens routed to each expert.
    """
    main_BTD, mtp_hidden, stats = model.hidden_states(
        batch["tokens"][:, :-1], segments_BT=input_segments(batch)
    )
    count = num_targets(batch)
    main, mtp = token_losses(model, main_BTD, mtp_hidden, batch, count)
    _, weights_BT = position_targets(batch, 0)
    divergence = partial(_divergence, model.runtime.compute_dtype, config.temperature)
    teacher = {name: x for name, x in batch.items() if name.startswith("teacher_")}
    kl_BT = _each_token(divergence, model, main_BTD, teacher)
    kl = jnp.sum(weights_BT * kl_BT) / count
    balance_sum = balance_loss(stats, balance)
    followed = config.weight * config.temperature**2 * kl  # gradients shrink by 1 / tau^2
    total = (1 - config.weight) * main + followed + mtp_weight * mtp + balance_sum
    overflow = jnp.sum(stats.overflow)
    return DistillLosses(total, main, mtp, balance_sum, overflow, kl), stats.counts_E


def _divergence(compute_dtype, temperature, head_DV, hidden_D, teacher) -> jax.Array:
    """KL(p || q) at one token."""
    log_q_V = _logprobs(head_DV, hidden_D, compute_dtype, temperature)
    log_p = teacher["teacher_logprobs"]
    if "teacher_tokens" not in teacher:
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q_V))
    tokens_K, log_p_rest = teacher["teacher_tokens"], teacher["teacher_rest"]
    log_q_rest = jax.nn.logsumexp(log_q_V.at[tokens_K].set(-jnp.inf))
    kept = jnp.sum(jnp.exp(log_p) * (log_p - log_q_V[tokens_K]))
    return kept + jnp.exp(log_p_rest) * (log_p_rest - log_q_rest)


def _logprobs(head_DV, hidden_D, compute_dtype, temperature) -> jax.Array:
    """log softmax(hidden head / tau), float32 [V]."""
    # The head is cast here and not outside, so that its gradient is summed in float32.
    logits_V = jnp.einsum(
        *("D,DV->V", hidden_D.astype(compute_dtype), head_DV.astype(compute_dtype)),
        preferred_element_type=jnp.float32,
    )
    return jax.nn.log_softmax(logits_V / temperature)


def _each_token(function, model, *arrays_BT):
    """function(head, *arrays of one token) of all tokens; logits exist for a chunk at a time.

    Every device goes through its own tokens, and makes logits again in the backward pass.
    """
    head_DV, mesh = model.head.kernel[...], model.runtime.mesh
    chunk = max(1, LOGITS_BUDGET // head_DV.shape[1])

    def per_shard(head_DV, *arrays_BT):
        rows, length = arrays_BT[0].shape[:2]
        tokens = jax.tree.map(lambda x: x.reshape(rows * length, *x.shape[2:]), arrays_BT)
        of_token = jax.checkpoint(lambda arrays: function(head_DV, *arrays))
        out = jax.lax.map(of_token, tokens, batch_size=min(chunk, rows * length))
        return jax.tree.map(lambda x: x.reshape(rows, length, *x.shape[1:]), out)

    if mesh is None:
        return per_shard(head_DV, *arrays_BT)
    spec = token_spec(mesh, arrays_BT[0].shape[1])
    return jax.shard_map(
        per_shard,
        mesh=mesh,
        in_specs=(P(), *[spec] * len(arrays_BT)),
        out_specs=spec,
        check_vma=False,
    )(head_DV, *arrays_BT)

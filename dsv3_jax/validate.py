"""What a `Config` must satisfy. Everything that can be checked without devices or files."""

import re
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from dsv3_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from dsv3_jax.errors import UserError, did_you_mean
from dsv3_jax.parallel.pipeline.partition import moe_layers_of_stages
from dsv3_jax.parallel.pipeline.schedules import SCHEDULES, make_schedule

CHOICES = {
    "model.group_score": ("top2_sum", "max"),
    "model.affinity": ("sigmoid", "softmax"),
    "model.mtp_hidden": ("post_norm", "pre_norm"),
    "balance.method": ("loss_free", "auxiliary", "none"),
    "parallel.layout": ("zero1_ep", "fsdp_ep"),
    "parallel.schedule": tuple(SCHEDULES),
    "parallel.dispatch": ("padded", "ragged", "hierarchical"),
    "precision.compute": ("bfloat16", "float32", "fp8"),
    "precision.moments": ("bfloat16", "float32"),
    "precision.remat": ("none", "paper", "full"),
    "precision.gradient_scales": ("tiles", "blocks"),
    "precision.scales": ("fine", "tensor"),
    "optim.schedule": ("published", "cosine"),
    "grpo.reward": ("exact", "boxed", "boxed_and_format", "code"),
    "data.on_bad_record": ("stop", "skip"),
    "checkpoint.on_save_error": ("stop", "continue"),
    "grpo.form": ("token", "sequence"),
    "data.sources.kind": ("python", "text", "jsonl", "parquet", "arrayrecord"),
}

# Allowed intervals; a round bracket excludes the bound, so '(0, inf)' also rejects inf and nan.
_INT_INTERVAL = "[1, 2147483647]"
_MODEL_INTERVAL = "[1, 16777216]"  # a wrong exponent ends here and not in XLA
_FLOAT_INTERVAL = "(0, inf)"
_INTERVALS = {
    "run.seed": "[0, 2147483647]",
    "run.num_samples": "[0, inf)",
    "guard.window": "[2, inf)",
    "guard.sigmas": "[0, inf)",
    "guard.recheck_interval": "[0, inf)",
    "guard.hang_seconds": "[0, inf)",
    "run.eval_batches": "[0, inf)",
    "model.num_dense_layers": "[0, inf)",
    "parallel.max_deferred": "[0, inf)",
    "parallel.buffer_factor": "[1, inf)",
    "model.num_shared_experts": "[0, inf)",
    "model.mtp_depth": "[0, inf)",
    "model.yarn.factor": "[1, inf)",
    "model.yarn.mscale": "[0, inf)",
    "balance.bias_speed": "[0, inf)",
    "balance.sequence_weight": "[0, inf)",
    "balance.expert_weight": "[0, inf)",
    "balance.device_weight": "[0, inf)",
    "balance.communication_weight": "[0, inf)",
    "optim.warmup_steps": "[0, inf)",
    "optim.total_tokens": "[1, inf)",
    "optim.beta1": "[0, 1)",
    "optim.beta2": "[0, 1)",
    "optim.weight_decay": "[0, inf)",
    "optim.mtp_weight": "[0, inf)",
    "optim.mtp_weight_late": "[0, inf)",
    "optim.ema_decay": "[0, 1)",
    "data.batch_ramp_fraction": "[0, 1]",
    "data.fim_rate": "[0, 1]",
    "data.punctuation_split_rate": "[0, 1]",
    "data.validation_documents": "[0, inf)",
    "optim.final_lr": "[0, inf)",
    "extend.second_length": "[0, inf)",
    "data.max_bad_fraction": "[0, 1]",
    "sft.max_bad_fraction": "[0, 1]",
    "grpo.kl_weight": "[0, inf)",
    "distill.weight": "[0, 1]",
    "distill.top_k": "[0, inf)",
    "grpo.max_failed_fraction": "[0, 1]",
}
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text"}


def type_name(annotation: Any) -> str:
    """The allowed values of a field's type, in words."""
    words = [_TYPE_NAMES[t] for t in scalar_types(annotation)]
    return " or ".join(words + ["none"] * (types.NoneType in get_args(annotation)))


def scalar_types(annotation: Any) -> tuple[type, ...]:
    """The types of a field other than None: (int,) of `int | None`."""
    return tuple(t for t in get_args(annotation) or (annotation,) if t is not types.NoneType)


def validate(config: Config) -> None:
    """Checks a whole config.

    Raises:
      UserError: names the key, its value, what is allowed and how to mend it.
    """
    for key, value, annotation in _leaves(config, ""):
        _check_leaf(key, value, annotation)
    _check_model(config.model)
    _check_divides(
        "model.num_experts", config.model.num_experts, "parallel.expert", config.parallel.expert
    )
    _check_precision(config.precision)
    _check_batch(config.data, config.parallel, config.microbatch_sequences)
    _check_data(config.data, config.model)
    _check_pipeline(config)
    _check_context(config)
    _check_buffer_factor(config.parallel)
    _check_checkpoint(config.checkpoint)
    if config.parallel.dispatch == "hierarchical":
        if config.parallel.expert > config.parallel.devices_per_node:
            _check_divides(
                "parallel.expert",
                config.parallel.expert,
                "parallel.devices_per_node",
                config.parallel.devices_per_node,
            )
    if config.optim.schedule == "published":  # fine-tuning may take its length from the data
        _ = config.total_tokens  # raises when the length of the run is not given


def validate_model(model: ModelConfig) -> None:
    """Checks an architecture alone, as `validate` does.

    Raises:
      UserError: names the key, its value, what is allowed and how to mend it.
    """
    for key, value, annotation in _leaves(model, "model."):
        _check_leaf(key, value, annotation)
    _check_model(model)


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Key, value and annotation of every field, e.g. 'data.sources[0].weight', 0.3, float."""
    hints = get_type_hints(type(section))
    for item in fields(section):
        key, value, annotation = prefix + item.name, getattr(section, item.name), hints[item.name]
        if is_dataclass(annotation):
            if not isinstance(value, annotation):
                raise UserError(f"{key}={value!r} must be a {annotation.__name__}")
            yield from _leaves(value, f"{key}.")
        elif key == "data.sources":
            item_type = get_args(annotation)[0]
            if not isinstance(value, tuple) or not all(isinstance(v, item_type) for v in value):
                raise UserError(f"{key}={value!r} must be a tuple of {item_type.__name__}")
            for i, source in enumerate(value):
                yield from _leaves(source, f"{key}[{i}].")
        else:
            yield key, value, annotation


def _check_leaf(key: str, value: Any, annotation: Any) -> None:
    if value is None and types.NoneType in get_args(annotation):
        return
    allowed = scalar_types(annotation)
    # An integer may stand for a float; a bool, although Python counts it as one, for neither.
    fits = isinstance(value, (*allowed, int) if float in allowed else allowed)
    if not fits or (isinstance(value, bool) and bool not in allowed):
        raise UserError(f"{key}={value!r} has the wrong type; it must be {type_name(annotation)}")
    rule = re.sub(r"\[\d+\]", "", key)
    if rule in CHOICES and value not in CHOICES[rule]:
        raise UserError(
            f"{key}={value!r} is unknown;{did_you_mean(value, CHOICES[rule])} "
            f"allowed: {', '.join(CHOICES[rule])}"
        )
    if bool in allowed or str in allowed:
        return
    usual = _MODEL_INTERVAL if rule.startswith("model.") else _INT_INTERVAL
    interval = _INTERVALS.get(rule, _FLOAT_INTERVAL if float in allowed else usual)
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low or (value == low and interval[0] == "[")
    below = value < high or (value == high and interval[-1] == "]")
    if not (above and below):
        raise UserError(f"{key}={value!r} is out of range; it must lie in {interval}")


def _check_divides(what: str, value: int, by_what: str, by: int) -> None:
    if value % by:
        raise UserError(
            f"{what}={value} is not a multiple of {by_what}={by}; "
            f"change one of them, e.g. {what}={max(1, round(value / by)) * by}"
        )


def _check_at_most(what: str, value: float, limit_what: str, limit: float) -> None:
    if value > limit:
        raise UserError(f"{what}={value} exceeds {limit_what}={limit}; lower it")


def _check_model(model: ModelConfig) -> None:
    _check_at_most(
        "model.num_dense_layers", model.num_dense_layers, "model.num_layers", model.num_layers
    )
    if model.num_dense_layers == model.num_layers and not model.mtp_depth:
        raise UserError(
            f"model.num_dense_layers={model.num_dense_layers} leaves no MoE layer; "
            f"lower it or raise model.num_layers"
        )
    _check_divides("model.qk_rope_head_dim", model.qk_rope_head_dim, "2", 2)
    _check_divides("model.num_experts", model.num_experts, "model.num_groups", model.num_groups)
    _check_at_most(
        "model.num_groups_kept", model.num_groups_kept, "model.num_groups", model.num_groups
    )
    group_size = model.num_experts // model.num_groups
    reachable = group_size * model.num_groups_kept
    if model.experts_per_token > reachable:
        raise UserError(
            f"model.experts_per_token={model.experts_per_token} exceeds the {reachable} experts of "
            f"the {model.num_groups_kept} kept groups; lower it or raise model.num_groups_kept"
        )
    if model.num_groups > 1 and model.group_score == "top2_sum" and group_size < 2:
        raise UserError(
            f"model.group_score=top2_sum needs 2 experts a group but model.num_groups="
            f"{model.num_groups} leaves 1; lower it or set model.group_score=max"
        )
    if model.yarn.beta_fast <= model.yarn.beta_slow:
        raise UserError(
            f"model.yarn.beta_fast={model.yarn.beta_fast} must exceed "
            f"model.yarn.beta_slow={model.yarn.beta_slow}"
        )


def _check_precision(precision: PrecisionConfig) -> None:
    if precision.compute == "fp8":
        return
    for item in fields(PrecisionConfig):
        value = getattr(precision, item.name)
        if item.name in ("gradient_scales", "scales", "promotion") and value != item.default:
            raise UserError(
                f"precision.{item.name}={value} has no effect with precision.compute="
                f"{precision.compute}; set precision.compute=fp8 or leave it out"
            )


def _check_batch(data: DataConfig, parallel: ParallelConfig, rows: int) -> None:
    what = "microbatch_sequences" if data.microbatch_sequences else "sequences_per_step"
    shards = parallel.data * parallel.expert
    _check_divides(f"data.{what}", rows, "parallel.data*parallel.expert", shards)
    for name in ("sequences_per_step", "sequences_per_step_start", "batch_ramp_sequences"):
        value = getattr(data, name)
        if value is not None:
            _check_divides(f"data.{name}", value, "data.microbatch_sequences", rows)
    _check_at_most(
        "data.sequences_per_step_start",
        data.sequences_per_step_start or 0,
        "data.sequences_per_step",
        data.sequences_per_step,
    )


def _check_checkpoint(checkpoint: CheckpointConfig) -> None:
    interval, lost = checkpoint.interval_steps, checkpoint.max_lost_steps
    if lost is not None and lost < interval:
        raise UserError(
            f"checkpoint.max_lost_steps={lost} is less than the checkpoint.interval_steps="
            f"{interval} between two saves; lower the interval or raise it"
        )


def _check_buffer_factor(parallel: ParallelConfig) -> None:
    if parallel.buffer_factor is None:
        return
    if parallel.expert == 1 or parallel.dispatch == "ragged":
        what = "dispatch=ragged" if parallel.dispatch == "ragged" else "expert=1"
        raise UserError(
            f"parallel.buffer_factor={parallel.buffer_factor} has no effect with parallel.{what}; "
            f"leave it out or change parallel.{what.partition('=')[0]}"
        )


def _check_context(config: Config) -> None:
    """Sequences split over devices (parallel/context.py)."""
    context, length = config.parallel.context, config.data.sequence_length
    if context == 1:
        return
    if config.parallel.pipe > 1:
        raise UserError(
            f"parallel.context={context} does not run in a pipeline of parallel.pipe="
            f"{config.parallel.pipe}; set one of them to 1"
        )
    if config.precision.compute == "fp8":
        raise UserError(
            f"parallel.context={context} does not run in FP8; set precision.compute=bfloat16 or "
            f"parallel.context=1"
        )
    # Each device has two chunks, and a chunk is whole blocks of attention.
    _check_divides("data.sequence_length", length, "2*parallel.context", 2 * context)
    chunk = length // (2 * context)
    if chunk > 512 and chunk % 128:
        raise UserError(
            f"data.sequence_length={length} gives chunks of {chunk} tokens with parallel.context="
            f"{context}; such long ones must be multiples of 128: make it a multiple of "
            f"{256 * context}"
        )


def _check_pipeline(config: Config) -> None:
    """The schedule must accept the ranks and micro-batches, and every stage have a layer."""
    parallel, data, rows = config.parallel, config.data, config.microbatch_sequences
    if parallel.pipe == 1:
        if parallel.max_deferred is not None:
            raise UserError(
                f"parallel.max_deferred={parallel.max_deferred} has no effect with "
                f"parallel.pipe=1; leave it out or raise parallel.pipe"
            )
        return
    for sequences in {data.sequences_per_step, data.sequences_per_step_start} - {None}:
        try:
            schedule = make_schedule(parallel.schedule, parallel.pipe, sequences // rows)
        except UserError as problem:
            raise UserError(
                f"{problem} (a step has {sequences} sequences in micro-batches of {rows}: see "
                f"data.sequences_per_step and data.microbatch_sequences)"
            ) from None
    moe_layers_of_stages(config.model, schedule.num_stages)
    if parallel.schedule == "dualpipe" and data.sequences_per_step_start is not None:
        growth = config.batch_ramp_sequences
        _check_divides("data.batch_ramp_sequences", growth, "two micro-batches", 2 * rows)


def _check_data(data: DataConfig, model: ModelConfig) -> None:
    if data.sequence_length <= model.mtp_depth:
        raise UserError(
            f"data.sequence_length={data.sequence_length} must exceed "
            f"model.mtp_depth={model.mtp_depth}"
        )
    if not data.sources:
        raise UserError("data.sources is empty; name at least one source, e.g. python")
    for i, source in enumerate(data.sources):
        if source.kind == "python" and source.path not in ("", "packages"):
            raise UserError(
                f"data.sources[{i}].path={source.path!r} is unknown for kind python; allowed: "
                f"nothing (the standard library) or packages"
            )
        if source.kind != "python" and not source.path:
            raise UserError(
                f"data.sources[{i}].path is empty; kind {source.kind} needs a file, folder or "
                f"glob, e.g. {source.kind}:/data/corpus"
            )
        if not source.text_key:
            raise UserError(f"data.sources[{i}].text_key is empty; name the field with the text")
    if not data.tokenizer:
        raise UserError("data.tokenizer is empty; set it to train or to a tokenizer.json")

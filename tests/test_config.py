"""Configs: presets, overrides, what is rejected, and the JSON round trip."""

import dataclasses
import json
import random

import pytest

from dsv3_jax import configs
from dsv3_jax.config import Config, SourceConfig
from dsv3_jax.errors import UserError
from dsv3_jax.overrides import _keys, from_dict, load_config, to_dict
from dsv3_jax.validate import _INTERVALS, CHOICES, validate


def one_line(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 900
    return text


@pytest.mark.parametrize("name", configs.CONFIGS)
def test_every_preset_validates_and_survives_json(name):
    config = load_config(name)
    assert config.run.name == name
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optim.peak_lr=1e-4", 1e-4),
        ("optim.peak_lr=1", 1.0),
        ("optim.total_tokens=1e9", 1e9),
        ("optim.total_tokens=none", None),
        ("run.num_steps=1_000", 1000),
        ("run.num_steps=2e3", 2000),
        ("model.q_latent_dim=none", None),
        ("model.q_latent_dim=48", 48),
        ("model.yarn.enabled=True", True),
        ("model.yarn.factor=8", 8.0),
        ("data.deduplicate=false", False),
        ("data.tokenizer=/a=b/tokenizer.json", "/a=b/tokenizer.json"),
        ("balance.method=none", "none"),
        ("precision.compute=fp8", "fp8"),
        ("data.sources=python", (SourceConfig(),)),
        ("data.sources=python:packages", (SourceConfig(path="packages"),)),
        (
            "data.sources=jsonl:/p/a.jsonl#body*0.7,text:/p/b/*.txt*0.3,parquet:/p/*",
            (
                SourceConfig(kind="jsonl", path="/p/a.jsonl", text_key="body", weight=0.7),
                SourceConfig(kind="text", path="/p/b/*.txt", weight=0.3),
                SourceConfig(kind="parquet", path="/p/*"),
            ),
        ),
    ],
)
def test_overrides_are_read_as_the_type_of_their_field(override, value):
    config = load_config("tiny", [override])
    found = config
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == value and type(found) is type(value)
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("short", "compute", "activations"),
    [("fp8", "fp8", "bfloat16"), ("bf16", "bfloat16", "bfloat16"), ("f32", "float32", "float32")],
)
def test_precision_is_short_for_its_compute_format(short, compute, activations):
    config = load_config("tiny", [f"precision={short}"])
    assert config == load_config("tiny", [f"precision.compute={compute}"])
    assert config.precision.activations == activations
    assert from_dict(to_dict(config)) == config


def test_ablations_of_fp8_are_read():
    ablations = ["gradient_scales=blocks", "scales=tensor", "promotion=false"]
    overrides = ["precision=fp8", *(f"precision.{ablation}" for ablation in ablations)]
    precision = load_config("tiny", overrides).precision
    assert (precision.gradient_scales, precision.scales) == ("blocks", "tensor")
    assert precision.promotion is False


def test_overrides_apply_in_order_and_leave_the_rest():
    config = load_config("tiny", ["run.seed=1", "optim.beta1=0.8", "run.seed=2"])
    tiny = configs.get("tiny")
    assert config == dataclasses.replace(
        tiny,
        run=dataclasses.replace(tiny.run, seed=2),
        optim=dataclasses.replace(tiny.optim, beta1=0.8),
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.peak_lrr=1", ["optim.peak_lrr", "did you mean 'optim.peak_lr'", "optim.beta1"]),
        ("optm.peak_lr=1", ["did you mean 'optim.peak_lr'", "optim.*"]),
        ("model.sequence_length=64", ["did you mean 'data.sequence_length'"]),
        ("peak_lr=1e-3", ["did you mean 'optim.peak_lr'"]),
        ("model.yarn=true", ["group", "model.yarn.enabled"]),
        ("optim=1", ["group", "optim.peak_lr"]),
        ("model.yarn.facto=3", ["did you mean 'model.yarn.factor'"]),
        ("optim.peak_lr.x=3", ["unknown"]),
        ("optim.peak_lr", ["KEY=VALUE"]),
        ("=3", ["unknown"]),
        ("", ["KEY=VALUE"]),
        ("model.width=wide", ["model.width", "'wide'", "an integer"]),
        ("model.width=1.5", ["'1.5'", "an integer"]),
        ("model.width=1e400", ["an integer"]),
        ("model.width=none", ["an integer"]),
        ("model.width=", ["an integer"]),
        ("model.width=1e12", ["out of range"]),
        ("model.q_latent_dim=x", ["an integer or none"]),
        ("optim.peak_lr=fast", ["a number"]),
        ("data.deduplicate=yes", ["true or false"]),
        ("optim.peak_lr=-1e-3", ["optim.peak_lr=-0.001", "(0, inf)"]),
        ("optim.peak_lr=nan", ["out of range"]),
        ("optim.peak_lr=inf", ["out of range"]),
        ("optim.beta2=1", ["[0, 1)"]),
        ("data.fim_rate=1.1", ["[0, 1]"]),
        ("run.num_steps=0", ["run.num_steps=0"]),
        ("checkpoint.max_lost_steps=99", ["checkpoint.interval_steps=100", "lower the interval"]),
        ("run.num_steps=none", ["optim.total_tokens", "run.num_steps"]),
        ("model.affinity=sigmoyd", ["did you mean 'sigmoid'", "softmax"]),
        ("parallel.expert=3", ["model.num_experts", "parallel.expert=3"]),
        ("parallel.data=5", ["data.sequences_per_step=32", "data.sequences_per_step=40"]),
        ("parallel.schedule=dualpip", ["did you mean 'dualpipe'", "dualpipev, zb1p, 1f1b"]),
        ("parallel.context=0", ["parallel.context=0", "out of range"]),
        ("parallel.context=two", ["an integer"]),
        ("parallel.context=3", ["data.sequence_length=128", "2*parallel.context=6", "=126"]),
        ("run.scan_layers=no", ["true or false"]),
        ("parallel.max_deferred=0", ["no effect with parallel.pipe=1", "leave it out"]),
        (
            "data.sequences_per_step=20",
            ["data.sequences_per_step=20", "parallel.data*parallel.expert=8"],
        ),
        ("data.microbatch_sequences=24", ["data.sequences_per_step=32"]),
        ("data.sequences_per_step_start=64", ["exceeds"]),
        ("model.experts_per_token=5", ["4 experts", "num_groups_kept"]),
        ("model.num_groups=3", ["model.num_experts=8"]),
        ("model.num_groups=8", ["top2_sum", "model.group_score=max"]),
        ("model.num_groups_kept=5", ["exceeds model.num_groups=4"]),
        ("model.num_dense_layers=5", ["exceeds model.num_layers=4"]),
        ("model.qk_rope_head_dim=15", ["multiple of 2"]),
        ("model.yarn.beta_slow=40", ["beta_fast"]),
        ("data.sequence_length=1", ["mtp_depth"]),
        ("data.tokenizer=", ["data.tokenizer"]),
        ("data.sources=", ["data.sources is empty"]),
        ("data.sources=jsnl:/a", ["did you mean 'jsonl'", "parquet"]),
        ("data.sources=jsonl", ["data.sources[0].path is empty"]),
        ("data.sources=jsonl:/a#", ["text_key"]),
        ("data.sources=python:other", ["packages"]),
        ("data.sources=python,jsonl:/a*0", ["data.sources[1].weight=0.0"]),
        ("data.sources=python*-1", ["data.sources[0].weight=-1.0"]),
        ("data.sources=python*1e", ["a number"]),
        ("precision=fp16", ["precision='fp16'", "allowed: fp8, bf16, f32"]),
        ("precision=", ["allowed: fp8, bf16, f32"]),
        ("precision.compute=fp88", ["did you mean 'fp8'", "bfloat16, float32, fp8"]),
        ("precision.gradient_scales=blocks", ["no effect", "precision.compute=fp8"]),
        ("precision.scales=tensor", ["no effect", "precision.compute=fp8"]),
        ("precision.promotion=false", ["no effect", "precision.compute=fp8"]),
    ],
)
def test_bad_overrides_are_one_line_with_the_remedy(override, words):
    with pytest.raises(UserError) as error:
        load_config("tiny", [override])
    text = one_line(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pipe=3"], ["parallel.pipe=3", "use 2 or 4"]),
        (["parallel.pipe=8"], ["4 micro-batches", "16", "data.sequences_per_step"]),
        (["parallel.pipe=4"], ["4 micro-batches", "8", "data.microbatch_sequences"]),
        (["parallel.pipe=8", "parallel.schedule=1f1b"], ["4 micro-batches", "8"]),
        (
            ["parallel.pipe=2", "data.sequences_per_step=40"],
            ["5 micro-batches", "even", "use 4 or 6", "40 sequences", "micro-batches of 8"],
        ),
        (
            ["parallel.pipe=2", "data.sequences_per_step_start=16"],
            ["2 micro-batches", "4", "16 sequences"],
        ),
        (
            ["parallel.pipe=8", "parallel.schedule=dualpipev", "data.sequences_per_step=128"],
            ["model.num_layers=4", "16 pipeline stages", "at least 15 layers", "parallel.pipe"],
        ),
        (["parallel.pipe=2", "parallel.max_deferred=-1"], ["parallel.max_deferred=-1", "[0, inf)"]),
        (["parallel.pipe=0"], ["parallel.pipe=0"]),
    ],
)
def test_a_pipeline_that_cannot_run_is_one_line_with_the_remedy(overrides, words):
    """`tiny` has 32 sequences a step on data 2 x expert 4: four micro-batches of a row a device."""
    with pytest.raises(UserError) as error:
        load_config("tiny", overrides)
    text = one_line(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["parallel.pipe=2"], ["parallel.context=2", "parallel.pipe=2", "set one of them to 1"]),
        (["precision=fp8"], ["parallel.context=2", "set precision.compute=bfloat16"]),
        (["data.sequence_length=126"], ["2*parallel.context=4", "data.sequence_length=128"]),
        (["data.sequence_length=2064"], ["chunks of 516", "a multiple of 512"]),
    ],
)
def test_split_sequences_that_cannot_run_are_one_line_with_the_remedy(overrides, words):
    with pytest.raises(UserError) as error:
        load_config("tiny", ["parallel.context=2", *overrides])
    text = one_line(error)
    assert all(word in text for word in words), text


@pytest.mark.parametrize("schedule", ["dualpipe", "dualpipev", "zb1p", "1f1b"])
def test_a_pipeline_needs_no_more_than_its_axis_and_schedule(schedule):
    config = load_config("tiny", ["parallel.pipe=2", f"parallel.schedule={schedule}"])
    assert config.microbatch_sequences == 8


def test_a_model_without_experts_is_refused():
    with pytest.raises(UserError) as error:
        load_config("tiny", ["model.num_dense_layers=4", "model.mtp_depth=0"])
    assert "leaves no MoE layer" in one_line(error)


def test_unknown_config_names_the_nearest():
    with pytest.raises(UserError) as error:
        load_config("tinny")
    assert "did you mean 'tiny'" in one_line(error)


def test_every_key_rejects_what_its_type_cannot_hold():
    """Nonsense for every key: no traceback of ours, and only text fields may take it."""
    for key, annotation in _keys(Config):
        if annotation is str and key not in CHOICES:
            continue
        for text in ("?", "-3", "nan", "1e999"):
            with pytest.raises(UserError) as error:
                load_config("tiny", [f"{key}={text}"])
            assert key in one_line(error)


def test_generated_typos_never_escape():
    rng = random.Random(0)
    keys = [key for key, _ in _keys(Config)]
    for _ in range(200):
        key = list(rng.choice(keys))
        i = rng.randrange(len(key))
        key[i : i + 1] = rng.choice(["", "_", "x", ".", key[i] * 2])
        key = "".join(key)
        if key not in keys:
            with pytest.raises(UserError) as error:
                load_config("tiny", [f"{key}=1"])
            one_line(error)


def test_validate_rejects_wrong_types_in_configs_written_in_python():
    tiny = configs.get("tiny")
    for group, name, value in [
        ("model", "width", "128"),
        ("model", "width", 128.0),
        ("model", "width", True),
        ("model", "yarn", None),
        ("optim", "peak_lr", False),
        ("data", "deduplicate", 1),
        ("data", "sources", [SourceConfig()]),
        ("data", "sources", (1,)),
        ("data", "tokenizer", None),
    ]:
        section = dataclasses.replace(getattr(tiny, group), **{name: value})
        with pytest.raises(UserError) as error:
            validate(dataclasses.replace(tiny, **{group: section}))
        assert f"{group}.{name}" in one_line(error)


def test_tables_name_only_keys_that_exist():
    keys = {key for key, _ in _keys(Config)} | {"data.sources.kind", "data.sources.weight"}
    assert set(CHOICES) | set(_INTERVALS) <= keys


def test_a_config_of_an_older_version_gets_the_defaults_of_newer_keys():
    values = to_dict(configs.get("tiny"))
    del values["checkpoint"]["initial_weights"], values["model"]["yarn"]
    assert from_dict(values) == configs.get("tiny")


def test_from_dict_names_missing_and_extra_keys():
    for section, key in (("model", "width"), ("run", "name")):
        values = to_dict(configs.get("tiny"))
        del values[section][key]
        with pytest.raises(UserError) as error:
            from_dict(values)
        assert f"missing {section}.{key}" in one_line(error)
    values = to_dict(configs.get("tiny"))
    values["model"]["yarn"]["faktor"] = 3
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert "unknown model.yarn.faktor" in one_line(error)
    for damage in (lambda v: v.update(model=3), lambda v: v["data"].update(sources=[3])):
        values = to_dict(configs.get("tiny"))
        damage(values)
        with pytest.raises(UserError) as error:
            from_dict(values)
        one_line(error)
    values = to_dict(configs.get("tiny"))
    values["data"]["sources"] = 3
    with pytest.raises(UserError) as error:
        from_dict(values)
    assert "data.sources" in one_line(error)

"""From a name and `--set group.key=value` to a validated `Config`, and to JSON and back."""

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from dsv3_jax import configs
from dsv3_jax.config import Config, SourceConfig
from dsv3_jax.errors import UserError, did_you_mean
from dsv3_jax.validate import scalar_types, type_name, validate

# `--set precision=fp8`: what it sets, and to what.
_SHORTHANDS = {
    "precision": (
        "precision.compute",
        {"fp8": "fp8", "bf16": "bfloat16", "f32": "float32"},
    )
}


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the config called `name` with the overrides applied in order, validated.

    Values are read as the type of their field: integers may be written 1_000 or 1e6, floats 1e-4,
    switches true or false, optional fields none. `data.sources` takes a comma-separated list of
    `KIND[:PATH][#TEXT_KEY][*WEIGHT]`, e.g.

        --set data.sources=python
        --set data.sources=python:packages
        --set 'data.sources=jsonl:/data/a.jsonl#content*0.7,text:/data/books/*.txt*0.3'

    PATH is a file, folder or glob without commas; a last `*` counts as a weight when a number
    follows it. `precision=fp8`, `=bf16` and `=f32` are short for `precision.compute=...`.

    Args:
      name: a run of `dsv3_jax.configs`.
      overrides: 'group.key=value', e.g. 'optim.peak_lr=3e-4' or 'model.yarn.enabled=true'.

    Raises:
      UserError: unknown name or key, unreadable value, or a config that cannot work.
    """
    config = configs.get(name)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"--set {override!r} is not KEY=VALUE; e.g. --set optim.peak_lr=3e-4")
        if key in _SHORTHANDS:
            key, text = _expand(key, text)
        annotation = _annotation(key)
        config = _replace(config, key.split("."), _parse(key, text, annotation))
    validate(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """JSON-safe copy of a config; `from_dict` inverts it."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def from_dict(values: Mapping[str, Any]) -> Config:
    """The config that `to_dict` wrote, validated.

    Raises:
      UserError: missing or extra keys, by name, wrong types, or a config that cannot work.
    """
    config = _build(Config, values, "")
    validate(config)
    return config


def _expand(key: str, text: str) -> tuple[str, str]:
    """The full key and value of a shorthand."""
    full_key, values = _SHORTHANDS[key]
    if text not in values:
        hint = did_you_mean(text, values)
        raise UserError(f"--set {key}={text!r} is unknown;{hint} allowed: {', '.join(values)}")
    return full_key, values[text]


def _keys(section_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every settable key with its annotation."""
    for name, annotation in get_type_hints(section_type).items():
        if is_dataclass(annotation):
            yield from _keys(annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, annotation


def _annotation(key: str) -> Any:
    """The type of a key's field; `UserError` with the nearest key when there is none."""
    known = dict(_keys(Config))
    if key in known:
        return known[key]
    siblings = [k for k in known if k.startswith(key.rpartition(".")[0] + ".")]
    children = [k for k in known if k.startswith(key + ".")]
    if children:
        raise UserError(f"--set {key} is a group; set one of its keys: {', '.join(children)}")
    # The right name in the wrong group is likelier than a near spelling.
    namesakes = [k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]]
    hint = f" did you mean '{namesakes[0]}'?" if namesakes else did_you_mean(key, known)
    allowed = siblings or [f"{group.name}.*" for group in fields(Config)]
    raise UserError(f"--set {key} is unknown;{hint} allowed: {', '.join(allowed)}")


def _replace(section: Any, path: list[str], value: Any) -> Any:
    if len(path) > 1:
        value = _replace(getattr(section, path[0]), path[1:], value)
    return dataclasses.replace(section, **{path[0]: value})


def _parse(key: str, text: str, annotation: Any) -> Any:
    """Reads a value as the type of its field."""
    if get_origin(annotation) is tuple:
        return tuple(_parse_source(item) for item in text.split(",") if item)
    if text.lower() == "none" and types.NoneType in get_args(annotation):
        return None
    (scalar,) = scalar_types(annotation)
    try:
        return {bool: _parse_bool, int: _parse_int, float: float, str: str}[scalar](text)
    except ValueError:
        raise UserError(
            f"--set {key}={text!r} has the wrong type; it must be {type_name(annotation)}"
        ) from None


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError
    return text.lower() == "true"


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer() or abs(value) > 2**53:  # beyond, a float is not exact
            raise
        return int(value)


def _parse_source(item: str) -> SourceConfig:
    item, weight = re.fullmatch(r"(.*?)(?:\*([-+.\d][-+.\deE]*))?", item, re.DOTALL).groups()
    kind, _, rest = item.partition(":")
    path, hash_sign, text_key = rest.partition("#")
    values: dict[str, Any] = {"text_key": text_key} if hash_sign else {}
    if weight is not None:
        values["weight"] = _parse("data.sources.weight", weight, float)
    return SourceConfig(kind=kind, path=path, **values)


def _build(section_type: Any, values: Any, prefix: str) -> Any:
    """A dataclass from a mapping of its fields; an older version's lacks those that came since."""
    where = prefix[:-1] or "the config"
    if not isinstance(values, Mapping):
        raise UserError(f"{where} is {type(values).__name__}, not a table of keys")
    hints = get_type_hints(section_type)
    required = [f.name for f in fields(section_type) if _is_required(f)]
    missing = [prefix + name for name in required if name not in values]
    extra = [prefix + str(name) for name in values if name not in hints]
    if missing or extra:
        raise UserError(
            f"{where} does not fit this version: missing {', '.join(missing) or 'nothing'}; "
            f"unknown {', '.join(extra) or 'nothing'}"
        )
    built = {}
    for name in hints.keys() & values.keys():
        annotation, value = hints[name], values[name]
        if is_dataclass(annotation):
            value = _build(annotation, value, f"{prefix}{name}.")
        elif get_origin(annotation) is tuple and isinstance(value, list):
            item_type = get_args(annotation)[0]
            value = tuple(
                _build(item_type, v, f"{prefix}{name}[{i}].") for i, v in enumerate(value)
            )
        built[name] = value
    return section_type(**built)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING

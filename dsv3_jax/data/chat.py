"""Conversations as text and as ids, through the jinja template that a checkpoint carries (spec §8).

A message is {"role": ..., "content": text}; an assistant's may also hold "tool_calls", a list of
{"type": "function", "function": {"name": ..., "arguments": JSON text}}.
"""

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dsv3_jax.data.tokenizer import BOS, EOS, Tokenizer
from dsv3_jax.errors import UserError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_FILE, CONFIG_FILE = "chat_template.jinja", "tokenizer_config.json"

# What tokenizers trained here use: V3's layout, with each round of tool calls laid out like the
# first. Whitespace control is explicit, so that it reads the same under any jinja options.
BUILT_IN = r"""
{%- for message in messages %}
    {%- if message['content'] is not string and not message['tool_calls'] %}
        {{- raise_exception('message ' ~ loop.index0 ~ ' has no text as its content') }}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list %}
{%- for turn in turns %}
    {%- set follows_tool = loop.previtem is defined and loop.previtem['role'] == 'tool' %}
    {%- set precedes_tool = loop.nextitem is defined and loop.nextitem['role'] == 'tool' %}
    {%- if turn['role'] == 'user' %}
        {{- '<｜User｜>' + turn['content'] }}
    {%- elif turn['role'] == 'tool' %}
        {{- '' if follows_tool else '<｜tool▁outputs▁begin｜>' }}
        {{- '<｜tool▁output▁begin｜>' + turn['content'] + '<｜tool▁output▁end｜>' }}
        {{- '' if precedes_tool else '<｜tool▁outputs▁end｜>' }}
    {%- else %}
        {{- '' if follows_tool else '<｜Assistant｜>' }}
        {{- (turn['content'] or '').split('</think>')[-1] }}
        {%- for call in turn['tool_calls'] or [] %}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '\n' }}
            {{- '<｜tool▁call▁begin｜>' + call['type'] + '<｜tool▁sep｜>' }}
            {{- call['function']['name'] + '\n```json\n' + call['function']['arguments'] }}
            {{- '\n```<｜tool▁call▁end｜>' }}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' }}
        {%- endfor %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not (turns and turns[-1]['role'] == 'tool') %}
    {{- '<｜Assistant｜>' }}
{%- endif %}
"""


class ChatTemplate:
    """A jinja template in the environment that chat templates are written for.

    It runs in a sandbox: a template comes with a download.
    """

    def __init__(
        self,
        source: str = BUILT_IN,
        bos_token: str = BOS,
        eos_token: str = EOS,
        origin: str = "the chat template",
    ):
        """Compiles `source`; `origin` names it in error messages.

        Raises:
          UserError: it is not valid jinja.
        """
        self.source, self.bos_token, self.eos_token = source, bos_token, eos_token
        self.origin = origin
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{origin} is not valid jinja, line {error.lineno}: {error.message}; "
                "take it from the checkpoint's source again"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **extra: Any,
    ) -> str:
        """Lays a conversation out as text, control tokens by name.

        Args:
          add_generation_prompt: ends with what opens an assistant's answer.
          tools: for templates that describe tools; V3's and the built-in one do not.
          extra: further variables of the template.

        Raises:
          UserError: the messages are not ones, or the template refuses them.
        """
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if role not in ROLES:
                raise UserError(
                    f"message {number} has role {role!r};{did_you_mean(str(role), ROLES)} write "
                    f"{{'role': ..., 'content': ...}} with one of {', '.join(ROLES)}"
                )
        variables = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(variables | extra)
        except Exception as error:  # whatever the template's code runs into
            raise UserError(
                f"{self.origin} cannot lay out these messages ({error}); "
                "give each of them what the template reads, such as text as content"
            ) from error


def load_chat_template(path: str | Path, name: str = "default") -> ChatTemplate:
    """The template of a folder, or the built-in one when the folder carries none.

    Args:
      path: a folder, whose chat_template.jinja goes before its tokenizer_config.json; or a
        tokenizer_config.json.
      name: which one, where tokenizer_config.json lists several by name.

    Raises:
      UserError: the path is missing, or a file cannot be read, is not valid, or has no template of
        that name.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder or a {CONFIG_FILE}")
    config_file = path / CONFIG_FILE if path.is_dir() else path
    try:
        config = json.loads(config_file.read_bytes()) if config_file.is_file() else {}
        source, origin = config.get("chat_template"), config_file
        if isinstance(source, list):
            source = {entry["name"]: entry["template"] for entry in source}
        tokens = [_token_text(config.get(key), token) for key, token in _TOKENS]
        jinja_file = config_file.with_name(TEMPLATE_FILE)
        if jinja_file.is_file():
            source, origin = jinja_file.read_text(encoding="utf-8"), jinja_file
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{config_file} is damaged ({error!r}); download it again") from error
    if isinstance(source, dict):
        if name not in source:
            raise UserError(f"{origin} has no chat template {name!r}; choose of {list(source)}")
        source = source[name]
    if source is None:
        return ChatTemplate(BUILT_IN, *tokens)
    if not isinstance(source, str):
        raise UserError(f"the chat_template of {origin} is not text; download it again")
    return ChatTemplate(source, *tokens, origin=f"the chat template of {origin}")


def save_chat_template(template: ChatTemplate, folder: str | Path) -> None:
    """Writes a tokenizer_config.json that `load_chat_template` reads the same template from."""
    config = {
        "bos_token": template.bos_token,
        "eos_token": template.eos_token,
        "chat_template": template.source,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (Path(folder) / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> list[int]:
    """Ids of a conversation, BOS included; arguments and errors as for `ChatTemplate.render`.

    Control tokens that the template writes become their ids. Their names inside messages or tools
    stay plain text: nobody can open a turn from within a message.
    """
    names = sorted(tokenizer.control_ids, key=len, reverse=True)
    any_name = "|".join(map(re.escape, names))
    # Names in the messages are put between two marks; the template may still search for them.
    used = {*template.source, *any_name}
    _map_text(lambda text: used.update(text) or text, [messages, tools])
    opening, closing = _unused_characters(used)
    beginnings = {name[:length] for name in names for length in range(1, len(name))}

    def mark(text: str) -> str:
        marked = re.sub(f"({any_name})", rf"{opening}\1{closing}", text)
        # A name may not be put together either from the end of one text and what follows it.
        cut = any(text[-length:] in beginnings for length in range(1, len(names[0])))
        return marked + closing if cut else marked

    text = template.render(
        _map_text(mark, messages), add_generation_prompt, _map_text(mark, tools), **extra
    )
    marks = str.maketrans("", "", opening + closing)
    ids, start = [], 0
    for match in re.finditer(f"{opening}(?:{any_name}){closing}|({any_name})", text):
        if match[1]:
            ids += tokenizer.encode(text[start : match.start()].translate(marks))
            ids.append(tokenizer.control_ids[match[1]])
            start = match.end()
    return ids + tokenizer.encode(text[start:].translate(marks))


_TOKENS = (("bos_token", BOS), ("eos_token", EOS))


def _token_text(entry: str | dict[str, Any] | None, default: str) -> str:
    """The text of a token as tokenizer_config.json gives it: text, or an object that holds it."""
    text = entry["content"] if isinstance(entry, dict) else entry or default
    if not isinstance(text, str):
        raise TypeError(f"a token is {text!r}")
    return text


def _unused_characters(used: set[str]) -> tuple[str, str]:
    """Two private-use characters that are not used."""
    private = map(chr, (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE)))
    free = (character for character in private if character not in used)
    return next(free), next(free)


def _map_text(change: Callable[[str], str], value: Any) -> Any:
    """A copy of nested lists and dicts with each text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_text(change, key): _map_text(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(change, item) for item in value]
    return value


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is; jinja's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)

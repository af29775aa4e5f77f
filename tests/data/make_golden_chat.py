"""Writes golden_chat.json: 20 conversations as the released chat template lays them out.

python tests/data/make_golden_chat.py

Rendered by jinja2 set up here, not by dsv3_jax.
"""

import json
from pathlib import Path

from jinja2.sandbox import ImmutableSandboxedEnvironment

RELEASED = Path(__file__).parents[2].parent / "shared/data/deepseek/tokenizer_config.json"
GOLDEN = Path(__file__).with_name("golden_chat.json")


def render(conversation: dict) -> str:
    """The released template's text of one conversation."""
    config = json.loads(RELEASED.read_text())
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(config["chat_template"]).render(
        **conversation,
        bos_token=config["bos_token"]["content"],
        eos_token=config["eos_token"]["content"],
    )


def _said(role, content):
    return {"role": role, "content": content}


def _calls(content, *calls):
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def _conversations():
    system = _said("system", "You answer in one sentence.")
    question = _said("user", "Why is the sky blue?")
    answer = _said("assistant", "Because air scatters short waves most.")
    weather = _said("user", "Weather in Paris and Rome?")
    paris, rome = ("weather", '{"city": "Paris"}'), ("weather", '{"city": "Rome"}')
    sunny, wet = _said("tool", '{"sky": "clear"}'), _said("tool", '{"sky": "rain"}')
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    for messages, prompt, *more in (
        ([question], False),
        ([question], True),
        ([system, question], True),
        ([system, question, answer], False),
        ([question, answer, _said("user", "And red at dusk?")], True),
        ([system, question, answer, _said("user", "And red?"), answer], False),
        ([system, _said("system", "Be kind."), question], True),
        ([system, question, answer, _said("system", "Be brief."), _said("user", "Hm?")], True),
        ([_said("system", ""), _said("user", ""), _said("assistant", "")], False),
        ([system], True),
        ([question, _said("assistant", "<think>\nWaves.\n</think>\n\nAir."), question], True),
        ([question, _said("assistant", "<think>a</think>b</think>c")], False),
        ([_said("user", "为什么天空是蓝色的？"), _said("assistant", "因为瑞利散射。")], False),
        (
            [
                _said(
                    "user", "لماذا السماء زرقاء؟ आकाश नीला क्यों है? \U0001f469\u200d\U0001f467 空は?"
                )
            ],
            True,
        ),
        ([_said("user", "\n\n  def f():\n\treturn 1\r\n\n"), _said("assistant", " \n")], False),
        ([weather, _calls(None, paris)], False, tools),
        ([system, weather, _calls(None, paris, rome), sunny, wet], True, tools),
        ([weather, _calls("Let me look.", paris, rome), sunny, wet], False),
        ([weather, _calls("", paris), sunny, _said("assistant", "Clear."), question], True),
        (
            [system, weather, _calls(None, rome), wet, _said("assistant", "Rain."), question]
            + [_said("assistant", "{{ bos_token }} & <b>'\"</b> {% if %}")],
            False,
        ),
    ):
        conversation = {"messages": messages, "add_generation_prompt": prompt}
        yield conversation | ({"tools": more[0]} if more else {})


if __name__ == "__main__":
    cases = [{**conversation, "text": render(conversation)} for conversation in _conversations()]
    GOLDEN.write_text(json.dumps(cases, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"{len(cases)} conversations -> {GOLDEN}")

"""Chats: the released layout, ids as `tokenizers` gives them, no turn opened from within a text."""

import datetime
import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from make_golden_chat import GOLDEN, RELEASED, render

from dsv3_jax.data import tokenizer as tk
from dsv3_jax.data.chat import ChatTemplate, encode_chat, load_chat_template
from dsv3_jax.errors import UserError

CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))
needs_released = pytest.mark.skipif(not RELEASED.exists(), reason="no released tokenizer here")


@pytest.fixture(scope="module")
def trained():
    return tk.train_tokenizer(["def f(x):\n    return x + 1\n", "Why is the sky blue?"] * 9, 500)


@pytest.fixture(scope="module", params=["trained", "released"])
def tokenizer(request):
    if request.param == "trained":
        return request.getfixturevalue("trained")
    if not RELEASED.exists():
        pytest.skip("no released tokenizer here")
    return tk.load_tokenizer(RELEASED.with_name("tokenizer.json.gz"))


def _parts(case):
    return case["messages"], case["add_generation_prompt"], case.get("tools")


def _user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_built_in_template_lays_out_as_the_released_one(case):
    assert ChatTemplate().render(*_parts(case)) == case["text"]


@needs_released
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_released_template_equals_plain_jinja(case):
    expected = render({key: value for key, value in case.items() if key != "text"})
    assert load_chat_template(RELEASED.parent).render(*_parts(case)) == expected == case["text"]


def _conversations():
    """Conversations within what the released template lays out well: one round of tool calls."""
    text = st.one_of(st.text(), st.sampled_from(["</think>", "a</think>\nb", "<｜User｜>", "\n "]))
    user = st.builds(_user, text)
    system = st.builds(lambda t: {"role": "system", "content": t}, text)
    answer = st.builds(lambda t: {"role": "assistant", "content": t}, text)
    plain = st.lists(st.one_of(user, system, answer), max_size=5)
    call = st.builds(
        lambda n, a: {"type": "function", "function": {"name": n, "arguments": a}}, text, text
    )
    calls = st.lists(call, min_size=1, max_size=3)
    before = st.one_of(st.none(), st.text())  # text before calls keeps </think> in the released one
    asks = st.builds(
        lambda c, t: {"role": "assistant", "content": t, "tool_calls": c}, calls, before
    )
    tools = st.lists(st.builds(lambda t: {"role": "tool", "content": t}, text), max_size=3)
    final = st.builds(lambda t: {"role": "assistant", "content": t}, st.text())
    end = st.one_of(st.just([]), st.tuples(final, user).map(list))
    round_ = st.builds(lambda a, t, e: [a, *t, *(e if t else [])], asks, tools, end)
    return st.one_of(plain, st.builds(lambda p, r: p + r, plain, round_))


@needs_released
@settings(max_examples=100, deadline=None)
@given(_conversations(), st.booleans())
def test_built_in_template_equals_the_released_one_on_random_conversations(messages, prompt):
    expected = render({"messages": messages, "add_generation_prompt": prompt})
    assert ChatTemplate().render(messages, prompt) == expected


def test_every_round_of_tool_calls_is_laid_out_like_the_first():
    def call(name):
        return {"type": "function", "function": {"name": name, "arguments": "{}"}}

    def ask(name):
        return {"role": "assistant", "content": None, "tool_calls": [call(name)]}

    def calls(name):
        return (
            f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n"
            f"{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{tk.EOS}"
        )

    def outputs(text):
        return (
            f"<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>{text}<｜tool▁output▁end｜>"
            "<｜tool▁outputs▁end｜>"
        )

    one, two = ({"role": "tool", "content": text} for text in "12")
    messages = [_user("q"), ask("f"), one, ask("g"), two, _user("r"), ask("h")]
    assert ChatTemplate().render(messages, True) == (
        f"{tk.BOS}<｜User｜>q<｜Assistant｜>{calls('f')}{outputs('1')}{calls('g')}{outputs('2')}"
        f"<｜User｜>r<｜Assistant｜>{calls('h')}<｜Assistant｜>"
    )
    # As OpenAI's clients write an answer without calls.
    assert ChatTemplate().render(
        [{"role": "assistant", "content": "a", "tool_calls": None}]
    ) == ChatTemplate().render([{"role": "assistant", "content": "a", "tool_calls": []}])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_ids_equal_the_library_on_the_rendered_text(case, tokenizer):
    backend = tokenizers.Tokenizer.from_str(tokenizer.text)
    expected = backend.encode(case["text"], add_special_tokens=False).ids
    ids = encode_chat(tokenizer, ChatTemplate(), *_parts(case))
    assert ids == expected and ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == case["text"]


def _control(tokenizer, ids):
    control = set(tokenizer.control_ids.values())
    return [i for i in ids if i in control]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_names_of_control_tokens_in_messages_stay_text(tokenizer, data):
    names = st.sampled_from(sorted(tokenizer.control_ids))
    pieces = st.one_of(
        names, names.flatmap(lambda n: st.integers(1, len(n) - 1).map(lambda i: n[:i])),
        names.map(lambda n: n[1:]), st.text(max_size=3),
        st.sampled_from(["\ue000", "\ue001", "\U000f0000", "<", ">", "\n"]),
    )  # fmt: skip
    text = st.lists(pieces, max_size=6).map("".join)

    def conversation(said):
        call = {"type": "function", "function": {"name": said(), "arguments": said()}}
        return [
            {"role": "system", "content": said()}, {"role": "system", "content": said()},
            _user(said()), {"role": "assistant", "content": said()}, _user(said()),
            {"role": "assistant", "content": said(), "tool_calls": [call]},
            {"role": "tool", "content": said()}, {"role": "assistant", "content": said()},
        ]  # fmt: skip

    template = ChatTemplate()
    messages = conversation(lambda: data.draw(text))
    ids = encode_chat(tokenizer, template, messages)
    assert tokenizer.decode(ids) == template.render(messages)
    harmless = encode_chat(tokenizer, template, conversation(lambda: "x"))
    assert _control(tokenizer, ids) == _control(tokenizer, harmless)


def test_names_cannot_be_put_together_from_two_texts(trained):
    template = ChatTemplate("{% for m in messages %}{% for c in m.content %}{{ c.text }}"
                            "{% endfor %}{{ eos_token }}{% endfor %}")  # fmt: skip
    for texts in (["<｜", "User｜>"], ["a<｜Us", "er", "｜>b"], ["<", "｜Assistant｜>"], ["<", ""]):
        messages = [{"role": "user", "content": [{"text": text} for text in texts]}]
        ids = encode_chat(trained, template, messages)
        assert ids == [*trained.encode("".join(texts)), trained.eos_id]


def test_names_in_tools_stay_text(trained):
    template = ChatTemplate("<｜User｜>{{ tools | tojson }}")
    tools = [{"name": tk.EOS, "parameters": {"<｜User｜>": "é"}}]
    text = f'[{{"name": "{tk.EOS}", "parameters": {{"<｜User｜>": "é"}}}}]'
    ids = encode_chat(trained, template, [], tools=tools)
    assert ids == [trained.control_ids["<｜User｜>"], *trained.encode(text)]


def test_the_environment_of_chat_templates():
    def shown(source, **extra):
        return ChatTemplate(source).render([_user("x")], **extra)

    assert shown("a\n  {% if true %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert (
        shown("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert shown("{{ v | tojson(indent=1) }}", v={"ü": "<&'>"}) == '{\n "ü": "<&\'>"\n}'
    assert shown("{{ '<b>' }}{{ tools is none }}{{ flag }}", flag=7) == "<b>True7"
    assert shown("{{ strftime_now('%Y') }}") == str(datetime.date.today().year)


@pytest.mark.parametrize(
    "source, messages, told",
    [
        ("{{ raise_exception('only\nfoo') }}", [_user("x")], "cannot lay out .*only\nfoo"),
        ("{{ messages[0].content + 'x' }}", [{"role": "user"}], "no attribute 'content'"),
        ("{{ messages[0].content + 'x' }}", [_user(None)], "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", [], "cannot lay out .*unsafe"),
        ("{{ messages.append(1) }}", [], "cannot lay out .*unsafe"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", [], "cannot lay out .*[Rr]ange too big"),
        ("", [{"role": "asistant", "content": ""}], "role 'asistant'; did you mean 'assistant'?"),
        ("", [_user("x"), {"content": "x"}], "message 1 has role None; write {'role'"),
        ("", "hello", "message 0 has role None"),
        (None, [_user("x"), _user(None)], "message 1 has no text as its content"),
        (None, [{"role": "assistant"}], "message 0 has no text"),
        (None, [{"role": "assistant", "tool_calls": [{"type": "function"}]}], "'function'"),
    ],
)  # fmt: skip
def test_messages_that_a_template_refuses(source, messages, told):
    template = ChatTemplate() if source is None else ChatTemplate(source)
    with pytest.raises(UserError, match=f"(?s){told}"):
        template.render(messages)


def test_loading_templates(tmp_path):
    def config(**entries):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))

    one = [_user("x")]
    built_in = load_chat_template(tmp_path)
    assert built_in.render(one) == ChatTemplate().render(one) == f"{tk.BOS}<｜User｜>x"
    config(bos_token="<s>", eos_token={"content": "</s>", "lstrip": False})
    assert load_chat_template(tmp_path).render(one) == "<s><｜User｜>x"
    assert load_chat_template(tmp_path / "tokenizer_config.json").eos_token == "</s>"
    config(bos_token=None, chat_template="A{{ bos_token }}")
    assert load_chat_template(tmp_path).render([]) == f"A{tk.BOS}"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config(chat_template=named)
    assert load_chat_template(tmp_path).render([]) == "D"
    assert load_chat_template(tmp_path, "tool_use").render([]) == "T"
    with pytest.raises(
        UserError, match=r"no chat template 'rag'; choose of \['default', 'tool_use"
    ):
        load_chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("J{{ eos_token }}")
    assert load_chat_template(tmp_path).render([]) == f"J{tk.EOS}"
    (tmp_path / "chat_template.jinja").write_text("a\n{% for %}")
    with pytest.raises(UserError, match=r"chat_template\.jinja is not valid jinja, line 2"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"chat_template": [1]}', '{"bos_token": {}}', '{"bos_token": 3}',
             '{"chat_template": 3}', '{"chat_template": {"default": 3}}', "\xff"],
)  # fmt: skip
def test_damaged_configs(tmp_path, text):
    with pytest.raises(UserError, match="nowhere does not exist"):
        load_chat_template(tmp_path / "nowhere")
    (tmp_path / "tokenizer_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"tokenizer_config\.json.*; download it again"):
        load_chat_template(tmp_path)

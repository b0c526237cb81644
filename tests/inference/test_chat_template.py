"""Chat templates are programs of strangers: ordinary ones give what transformers gives, others end with one line."""

from pathlib import Path
from typing import Any

import pytest
from in_fork import check_in_fork

from yoco_u.confined.nursery import wait
from yoco_u.data import load_tokenizer, train_tokenizer
from yoco_u.errors import UserError
from yoco_u.inference import chat_template
from yoco_u.inference.chat_template import chat_text, chat_tokens, template_file, why_no_chats

TOKENIZER = train_tokenizer(["hello you"], 300)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "héllo 🦉 \ud800 {{ 1 }}"},
    {"role": "assistant", "content": " yes  "},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


def text(template: Any, messages: Any = CHAT, **options: Any) -> str:
    TOKENIZER.chat_template = template
    return chat_text(TOKENIZER, messages, **options)


@pytest.mark.parametrize(
    "template",
    [
        PLAIN,
        PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}",
        PLAIN + "{{ tools | tojson(indent=2) }}{% if tools %}{{ tools[0].function.name }}{% endif %}",
        PLAIN + "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
        PLAIN + "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
        PLAIN + "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        {"default": PLAIN, "tool_use": PLAIN + "{{ tools }}"},
    ],
)
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("goes_on", [False, True])
def test_the_text_is_that_of_transformers(template: Any, tools: Any, goes_on: bool) -> None:
    messages = [CHAT[0], {"role": "user", "content": "héllo 🦉 {{ 1 }}", "name": None}, CHAT[2]]
    TOKENIZER.chat_template = template
    expected = TOKENIZER.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
    )
    assert text(template, messages, tools=tools, continue_final_message=goes_on) == expected
    assert goes_on or tools or chat_tokens(TOKENIZER, messages) == TOKENIZER.encode(expected, add_special_tokens=False)


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% if j < 0 %}x{% endif %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'ab' * 10**7 }}", "20000000 characters"),
        ("{{ [0] * 10**10 }}", "MemoryError"),
        ("{{ range(10**9) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ self.__init__.__globals__ }}", "unsafe"),
        ("{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1)[0][0].a }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set n = namespace() %}{% set n.__class__ = messages %}{{ n.__class__.__mro__ }}", "(unsafe|underscore)"),
        (ENDLESS, "it takes more than 1 s of computing or 256 MiB"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"^the model's chat template refuses these messages: .*{reason}") as caught:
        text(template)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert why_no_chats(TOKENIZER) is None
    assert text(PLAIN, CHAT[:1]).endswith("<system>Be short.\n")


@pytest.mark.parametrize("lines", [0, 3])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "line 1: Expected an expression"),
        ("{{ x | nosuch }}", "line 1: No filter named 'nosuch'"),
        ("{% nosuch %}", "line 1: Encountered unknown tag 'nosuch'"),
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("{{ 'abc }}", "line 1: unexpected char"),
        ("{{ (1 }}", "line 1: unexpected '}'"),
        ("{{ a b }}", "line 1: expected token"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "recursion"),
        ("{{ 10 ** 10000 }}", "Exceeds the limit"),
        ("{{ " + "9" * 5000 + " }}", "Exceeds the limit"),
    ],
)
def test_a_template_that_cannot_be_compiled_is_blamed_itself(template: str, reason: str, lines: int) -> None:
    before, reason = "{# x #}\n" * lines, reason.replace("line 1", f"line {lines + 1}")
    with pytest.raises(UserError) as caught:
        text(before + template)
    assert str(caught.value) == why_no_chats(TOKENIZER)
    assert str(caught.value).startswith("this model's chat template is broken (") and reason in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_choice_of_templates_without_one_for_chats() -> None:
    with pytest.raises(UserError, match=r"chat template is broken .*no default"):
        text({"tool_use": PLAIN})
    assert text({"tool_use": PLAIN}, tools=TOOLS)


@pytest.mark.parametrize("own", [True, False])
def test_the_file_of_a_template_is_found(own: bool, tmp_path: Path) -> None:
    TOKENIZER.chat_template = "{% if %}"
    TOKENIZER.save_pretrained(tmp_path, save_jinja_files=own)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == "{% if %}"
    assert "{% if %}" in template_file(loaded).read_text(encoding="utf-8")


def test_messages_that_no_template_can_take() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for messages in ([{"role": "user", "content": deep}], [{"role": "user", "content": float("nan")}], []):
        try:
            assert isinstance(text(PLAIN, messages), str)
        except UserError as error:
            assert "refuses these messages" in str(error)


def test_without_a_template() -> None:
    with pytest.raises(UserError, match="no chat template"):
        text(None)


def test_processes_that_were_ended_from_outside_are_replaced() -> None:
    text(PLAIN)
    for process in list(chat_template._IDLE.queue):
        process.ask(b"[]")  # an answer that nobody waits for makes it as unusable as its end does
        wait([process], 30)
    assert text(PLAIN, CHAT[:1]).endswith("<system>Be short.\n")


def test_a_forked_process_does_not_take_part_in_its_parents_chats() -> None:
    expected = text(PLAIN)
    assert chat_template._IDLE.qsize() > 0

    def child() -> None:
        assert chat_template._idle_process() is None
        assert text(PLAIN) == expected

    check_in_fork(child)
    assert text(PLAIN) == expected

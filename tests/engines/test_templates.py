"""Chat templates: what real ones expect, and what hostile ones get."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from ai_assistant.engines.templates import MAX_TEMPLATE, ChatTemplate
from ai_assistant.errors import InvalidArgument, InvalidModel

_USER = {"role": "user", "content": "hi"}


def test_the_fallback_is_chatml() -> None:
    text = ChatTemplate("").render([{"role": "system", "content": "Be brief."}, _USER])
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>hi</s>"),
        ("{% for m in messages %}\n    {% if m.role == 'user' %}\nU\n    {% endif %}\n{% endfor %}", "U\n"),
        ("{{ {'a': 'é', 'b': [1]} | tojson }}", '{"a": "é", "b": [1]}'),
        ("{{ {'a': 1} | tojson(indent=2) }}", '{\n  "a": 1\n}'),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "10"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(1) ~ m('b') }}", "[1][b]"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ 'a,b'.split(',')[-1] }}{{ ' x '.strip() }}{{ messages[::-1][0].role }}", "bxuser"),
        ("{{ '%s-%02d' % ('a', 3) }}{{ '{}'.format(5) }}{{ 'q' | replace('q', 'r') }}", "a-035r"),
        (
            "{{ '7' | int + 1 }}{{ 'x' | int }}{{ '2.5' | float }}{{ 2.5 | round | int }}{{ 2.345 | round(2) }}",
            "802.522.35",
        ),
        (
            "{{ 2.1 | round(0, 'ceil') }}{{ 2.9 | round(method='floor') }}{{ [1, 2] | sum }}{{ 7 // 2 - 2 ** 3 }}",
            "3.02.03-5",
        ),
        ("{{ 'a'|safe + ({'b': '<'} | tojson) }}", 'a{"b": "<"}'),
        ("{{ '<a>' | e }}{{ '<a>' | safe }}{{ ' x ' | trim }}{{ 'xax' | trim('x') }}", "&lt;a&gt;<a>xa"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 'a' in {'a': 1}.keys() }}", "a1True"),
        ("{{ 'a</think>b'.split('</think>')[-1].lstrip('\n') }}{{ 'a-b'.rsplit('-', 1)[0] }}", "ba"),
        ("{% set x %}{% for i in range(3) %}{{ i }}{% endfor %}{% endset %}{{ x | upper }}", "012"),
        ("{{ ['a', 'b'] | join('+') }}{{ (1, 2) | length }}{{ 'a\nb' | indent(2) }}", "a+b2a\n  b"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render([_USER]) == expected


def test_messages_are_made_plain() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}|{{ (m.tool_calls or 0) | tojson }};{% endfor %}"
    )
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    text = template.render(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
    )
    assert text.startswith("system:ab|")
    assert '"arguments": {"a": 1}' in text


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "king", "content": "x"}, "messages[0].role"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        (
            {"role": "user", "content": [{"type": "text", "text": "see"}, {"type": "image_url"}]},
            "messages[0].content[1]",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, "messages[0].content[0]"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "messages[0].tool_call_id"),
        ({"role": "user", "content": "x", "name": ["x"]}, "messages[0].name"),
        ({"role": "assistant", "tool_calls": "x"}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, "messages[0].tool_calls"),
    ],
)
def test_wrong_messages(message: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ChatTemplate("").render([message])
    assert caught.value.param == param


def test_an_image_is_refused_with_what_to_do() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(InvalidArgument, match="reads text only") as caught:
        ChatTemplate("").render([{"role": "user", "content": [part]}])
    assert caught.value.hint


def test_tool_results_reach_the_template() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}/{{ m.tool_call_id }}/{{ m.name }}:{{ m.content }};{% endfor %}"
    )
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}
    text = template.render(
        [
            _USER,
            {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "c2"}]},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "21 °C"},
            {"role": "tool", "tool_call_id": "c2", "name": "f", "content": [{"type": "text", "text": "19 °C"}]},
        ]
    )
    assert text.endswith("tool/c1/f:21 °C;tool/c2/f:19 °C;")


def test_a_template_may_refuse() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([_USER])


def test_tools_reach_templates_that_know_them_and_the_system_text_of_others() -> None:
    function = {"name": "warm", "parameters": {"type": "object"}}
    knows = ChatTemplate("{% for t in tools %}{{ t.function.name }}{% endfor %}")
    assert knows.render([_USER], [function]) == "warm"
    text = ChatTemplate("").render([_USER], [function])
    assert text.startswith("<|im_start|>system\n")
    assert '"name": "warm"' in text
    assert "<tool_call>" in text
    merged = ChatTemplate("").render([{"role": "system", "content": "Be brief."}, _USER], [function])
    assert merged.count("<|im_start|>system") == 1


_BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
    "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s.join(ns.s) %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
    "{{ 'a' * 10**9 }}", "{{ [1] * 10**9 }}", "{{ 10**(10**10) }}",
    "{{ 'x'.center(10**12) }}", "{{ 'x'.zfill(10**10) }}",
    "{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{% for x in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{{ range(99999) | map('string') | join('a' * 1000) }}",
    # The longest format string that a pattern in quadratic time would take an hour for.
    "{{ (':' * 9999999) % 1 }}", "{{ (':' * 9999999).format(1) }}",
    "{{ ('{0}' * 1000).format('x' * 10**7) }}", "{{ ('%(a)s' * 500) % {'a': 'x' * 10**7} }}",
    "{{ ('{a}' * 1000).format_map({'a': 'x' * 10**7}) }}",
    # Numbers: long products, quotients, powers, and digits in between.
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 0x" + "f" * 400_000 + " // 0x" + "e" * 200_000 + " }}", "{{ 0x" + "f" * 400_000 + " % 7 }}",
    "{{ ('f' * 10**7) | int(base=16) * 2 + 2**2000 }}", "{{ (2**1000) ** 64 }}", "{{ 2 ** -(10**9) }}",
    "{{ 1 | round(10**9, 'ceil') }}", "{{ 5 | round(-(10**9)) }}", "{{ (5).to_bytes(10**9, 'big') }}",
    "{{ [1.5, 10**300, 10**300] | sum * 10**300 }}", "{{ [2**1023, 2**1023, 2**1023] | sum }}",
    "{{ [[1] * 300] * 300 | list }}{{ ([[1]] * 60000) | sum(start=[]) }}",
    # Methods and filters of text.
    "{{ ('a' * 10**7).rfind('b' + 'a' * 5 * 10**6) }}", "{{ ('a' * 10**7).strip('b' * 10**7 + 'a') }}",
    "{{ ('a' * 10**7) | trim('b' * 10**7 + 'a') }}", "{{ 'x'.encode().center(10**9) }}",
    "{{ ('\t' * 10**6).expandtabs(90000) }}", "{{ ('x' * 10**6).translate({120: 'y' * 10**6}) }}",
    "{{ ('<!--' * 10**6) | striptags }}", "{{ ('x ' * 8 * 10**6).split() }}", "{{ ('x,' * 8 * 10**6).split(',') }}",
    "{{ ('&' * 10**7) | e }}", "{{ ('x' * 10**7) | list }}", "{{ ('\n' * 10**6) | indent(width='x' * 100) }}",
    # Collected, not printed.
    "{% set x = 'x' * 10**7 %}{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
    "{% macro m() %}{% for i in range(9999) %}{{ 'x' * 10**7 }}{% endfor %}{% endmacro %}{% set y = m() %}",
    # Printed once, reachable many times.
    "{% set a = namespace() %}" + "{% set a = namespace(x=a, y=a) %}" * 99 + "{{ [a, a * 2] }}",
    "{% set a = {'x': 1} %}" + "{% set a = {'x': a.items(), 'y': a.items()} %}" * 60 + "{{ a }}",
    # Without a loop, nothing but the clock.
    "{% set x = 'xy' * 8 * 10**6 %}" + "{% set y = x | upper | lower | title %}" * 5000,
    "{% set x = 'xy' * 8 * 10**6 %}" + "{% set y = x.upper().lower().title() %}" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("source", _BOMBS)
def test_bombs_go_off_in_nobodys_hands(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(InvalidModel) as caught:
        ChatTemplate(source).render([_USER])
    assert caught.value.name == "InvalidModel"
    # Of this thread alone: the machine may have other things to do.
    assert time.thread_time() - start < 15


def test_nothing_is_computed_when_a_template_is_compiled() -> None:
    text = "x" * 100_000
    source = "{{ '" + text + "' | replace('x', '" + "xy" * 80 + "')" + " | title | upper" * 40 + " | length }}"
    start = time.process_time()
    ChatTemplate(source)
    assert time.process_time() - start < 2


def test_printing_namespaces_that_hold_each_other() -> None:
    source = "{% set a = namespace() %}" + "{% set a = namespace(x=a, y=a) %}" * 99 + "{{ a }}"
    assert ChatTemplate(source).render([_USER]) == "<namespace>"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ ('%s' % messages).__class__ }}",
        "{{ nothing.of.the.kind }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% if %}",
        "{{ 1 / 0 }}",
        "{{ 'x' | nosuchfilter }}",
    ],
)
def test_what_the_sandbox_keeps_out(source: str) -> None:
    # Jinja prints an attribute that it keeps back as nothing, and fails on what would go on from there.
    text = ""
    with contextlib.suppress(InvalidModel):
        text = ChatTemplate(source).render([_USER])
    assert text == ""


def test_a_template_of_absurd_length() -> None:
    with pytest.raises(InvalidModel, match="characters long"):
        ChatTemplate("x" * (MAX_TEMPLATE + 1))
    with pytest.raises(InvalidModel):
        ChatTemplate("{{ " + "(" * 50_000 + " }}").render([_USER])

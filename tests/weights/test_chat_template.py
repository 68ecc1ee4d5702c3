"""What the templates of the usual families use renders as transformers renders it, and the sandbox holds.

`make oracle` compares the same cases with transformers itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from tests.weights.toy_tokenizers import toy

from shoal.engine.chat import Chat, Message
from shoal.engine.errors import MissingDependencyError, ShoalError, UnsupportedModelError
from shoal.engine.tokenizer import Tokenizer

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Sé"},
    {"role": "user", "content": " <b>it's\n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes.", "name": None},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CONSTRUCTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "generation": (
        """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}
{{- m.content[-4:] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
        {},
        "Sé <b>it's\nYes.</s>",
    ),
    "generation has a scope of its own": (
        "{% set x = 1 %}\n  {%- generation -%}\n {% set x = 2 %}{{ x }} {%- endgeneration %}{{ x }}",
        {},
        "21",
    ),
    "tojson": ("{{ messages[1] | tojson }}", {}, '{"role": "user", "content": " <b>it\'s\\n"}'),
    "tojson in ASCII": ("{{ messages[0].content | tojson(ensure_ascii=True) }}", {}, '"S\\u00e9"'),
    "tojson as it is": ("{{ messages[0].content | tojson(ensure_ascii=False) }}", {}, '"Sé"'),
    "tojson in lines": (
        "{{ {'b': [1, none], 'a': true} | tojson(indent=1) }}",
        {},
        '{\n "b": [\n  1,\n  null\n ],\n "a": true\n}',
    ),
    "tojson sorted and tight": (
        "{{ {'b': 1.5, 'a': {}} | tojson(separators=(',', ':'), sort_keys=True) }}",
        {},
        '{"a":{},"b":1.5}',
    ),
    "tojson by position": ("{{ ['é'] | tojson(true, 2) }}", {}, '[\n  "\\u00e9"\n]'),
    "break and continue": (
        """{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}
{%- endfor %}""",
        {},
        "user",
    ),
    "namespace": (
        """{% set ns = namespace(n=0, system=false) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{%- if m['role'] == 'system' %}{% set ns.system = true %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.system }}""",
        {},
        "3True",
    ),
    "variables that are not given": (
        """{{ tools is none }}{{ documents is none }}{{ date_string is defined }}
{{- enable_thinking is defined }}{% if tools %}T{% endif %}{{ date_string }}
{{- date_string | default('26 Jul 2024') }}{{ pad_token is defined }}
{%- if enable_thinking is defined and enable_thinking is false %}off{% endif %}""",
        {},
        "TrueTrueFalseFalse26 Jul 2024False",
    ),
    "variables that are given": (
        """{% if enable_thinking is defined and enable_thinking is false %}off{% endif %}{{ date_string }}
{{- tools[0].function.name }}{% for d in documents %}{{ d.title ~ d['text'] }}{% endfor %}""",
        {
            "enable_thinking": False,
            "date_string": "D",
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "documents": [{"title": "t", "text": "x"}],
        },
        "offDftx",
    ),
    "a field that is none is not there": (
        "{{ messages[2].name is defined }}{{ 'name' in messages[2] }}",
        {},
        "FalseFalse",
    ),
    "reasoning cut out": (
        """{% set c = messages[2].content %}{% if '</think>' in c %}
{{- c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') }}|
{{- c.split('</think>')[-1].lstrip('\n') }}{% endif %}""",
        {},
        "hm|Yes.",
    ),
    "methods of strings": (
        """{% set c = messages[1].content %}{{ c.strip().startswith('<b>') }}{{ c.upper() }}
{{- c | trim | title }}{{ c.replace('it', 'is').rstrip() }}{{ c.find('b') }}{{ c | length }}
{{- c[::-1] | trim }}{{ c.index('i') }}{{ 'a-b-c'.rsplit('-', 1) | join('+') }}{{ 'x'.join(['1', '2']) }}
{{- 'a\nb'.splitlines() | last }}{{ '%s=%d' % ('k', 3) }}{{ '{}{}'.format('p', 4) }}
{{- 'ab' * 2 }}{{ 'a' ~ 1 ~ none }}""",
        {},
        "True <B>IT'S\n<B>it's <b>is's29s'ti>b<4a-b+c1x2bk=3p4ababa1None",
    ),
    "a chain of filters": (
        """{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | first | trim }}
{{- messages | rejectattr('role', 'in', ['user', 'system']) | list | length }}{{ [3, 1] | sort | string }}""",
        {},
        "<b>it's1[1, 3]",
    ),
    "a macro with default arguments and a call block": (
        """{% macro turn(role, text='') %}<{{ role }}>{{ text | trim }}{{ caller() if caller }}{% endmacro %}
{{- turn('a', ' b ') }}{% call turn('c') %}d{% endcall %}""",
        {},
        "<a>b<c>d",
    ),
    "lines are trimmed": (
        "{% for m in messages %}\n    {% if true %}\n{{ m.role[0] }}\n    {% endif %}\n{% endfor %}\n",
        {},
        "s\nu\na\n",
    ),
    "items of a dictionary": (
        "{% for k, v in {'x': 1, 'y': [2]}.items() %}{{ k }}{{ v }}{% endfor %}{{ dict(a=1).a }}",
        {},
        "x1y[2]1",
    ),
    "whether a content is a text": (
        """{% for m in messages %}{% if m.content is string and m.content is not mapping %}{{ loop.index0 }}
{%- endif %}{% endfor %}{{ messages[-1].content is iterable }}{{ (messages | length) % 2 == 1 }}""",
        {},
        "012TrueTrue",
    ),
    "text escaped": ("{{ messages[1].content | e | trim }}{{ '<' | safe }}", {}, "&lt;b&gt;it&#39;s<"),
}


def render(template: str, variables: dict[str, Any], messages: list[dict[str, Any]] | None = None) -> str:
    chat = Chat(TOKENS, template, SPECIAL)
    return chat.render(MESSAGES if messages is None else messages, **variables)


TOKENS = Tokenizer.parse(toy("byte level").to_str().encode(), "toy")


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_constructs_of_templates(name: str) -> None:
    template, variables, expected = CONSTRUCTS[name]
    assert render(template, variables) == expected


def test_the_date_is_the_local_one() -> None:
    form = "%d %b %Y"
    before = datetime.now().strftime(form)  # noqa: DTZ005 as transformers has it
    assert render(f"{{{{ strftime_now('{form}') }}}}", {}) in (before, datetime.now().strftime(form))  # noqa: DTZ005


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "refuses these messages: no system"),
        ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ messages[0].update(role='x') }}", "'update' of 'dict' object is unsafe"),
        ("{{ messages[0].content._origin.x }}", "refuses these messages"),
        ("{{ cycler.__init__.__globals__ }}", "refuses these messages"),
        ("{{ '{0.__class__.__name__}'.format(messages[0].content) }}", "'__class__' of .* is unsafe"),
        ("{{ messages[0].content.missing.more }}", "refuses these messages"),
        ("{{ messages[9].content }}", "refuses these messages"),
        ("{{ bos_token + 1 }}", "refuses these messages"),
        ("{{ messages[0].content[:1e999] }}", "refuses these messages: name 'inf' is not defined"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ messages[0].content.index('zz') }}", "refuses these messages"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recurses endlessly"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "refuses these messages: Range too big"),
    ],
)
def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(ShoalError, match=message):
        render(template, {})


@pytest.mark.parametrize(
    "template",
    [
        *("{% for %}", "{% generation %}", "{{ 'a }}", "{% unknown %}", f"{{{{ {'9' * 5000} }}}}"),
        "{% for i in x %}" * 30 + "{% endfor %}" * 30,  # Python nests no more than 20 loops
    ],
)
def test_a_template_that_is_none(template: str) -> None:
    with pytest.raises(UnsupportedModelError, match="does not compile"):
        Chat(TOKENS, template, {})


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(MissingDependencyError, match="pip install jinja2"):
        Chat(TOKENS, "{{ x }}", {})


def test_a_longer_conversation_begins_with_the_ids_of_the_shorter_one() -> None:
    """What `shoal run` has computed for a turn is the beginning of the next one."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat, said = Chat(TOKENS, template, {}), [Message("user", "the ferry<|im_end|>")]
    first = chat.encode(said)
    said += [Message("assistant", "is late"), Message("user", "why?")]
    answer = TOKENS.encode("is late", special=False)
    assert chat.encode(said)[: len(first) + len(answer)] == first + answer
    assert chat.encode(said) == chat.encode(said)

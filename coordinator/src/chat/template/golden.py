"""Writes golden.json: template idioms and what Hugging Face transformers makes of them. Needs transformers and jinja2."""

import json
import pathlib

from transformers.utils.chat_template_utils import render_jinja_template

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Say "hé" <b>&\'\n'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhé", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"b": 1.5, "a": [1, 2.0, None, True]}}}]},
    {"role": "tool", "content": "3", "reasoning": "why"},
    {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "now"}]},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <&> 'é'\t\u0001\x7f 😀", "parameters": {
    "type": "object", "properties": {"items": {"type": "array", "items": {"type": "number"}}, "a": {}}, "required": ["a"]}}}]

TEMPLATES = {
    "loop": "{% for m in messages %}\n  {{ m.role }}: {{ m['content'] }}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:\n{% endif %}",
    "dashes": "{%- for m in messages -%}  {{- '<|' + m.role + '|>' -}} \n{%- endfor -%} x",
    "indented": "a\n    {% if true %}\n  b\n    {% endif %}\n\tc {# gone #}\n{#- gone -#}\n d\n",
    "tools": "{{ tools | tojson }}\n{{ tools[0].function | tojson(indent=4) }}\n{{ tools | tojson(separators=(',', ':')) }}",
    "tojson": "{{ {'b': 1, 'a': [1.0, 1e16, 1e-7, 0.1, 123456789012345680.0, -0.0], 1: none, 'e': {}, 'l': [], 't': (1,)} | tojson }}"
              "{{ {'b': 'é\"', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true) }}{{ '<>&\\'' | tojson }}{{ [[], {}] | tojson(indent=2) }}",
    "arguments": "{{ messages[2].tool_calls[0].function.arguments | tojson }}",
    "python print": "{{ true }} {{ none }} {{ 1.0 }} {{ 1e16 }} {{ [1, 'a', none, {'b': \"it's\"}] }} {{ (1,) }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 3 }}",
    "concat": "{{ 'a' ~ 1 ~ none ~ true ~ [1] ~ missing ~ 2.0 }}",
    "undefined": "[{{ missing }}][{{ messages[0].missing }}][{{ missing | default('d') }}][{{ '' | default('e', true) }}]"
                 "{{ missing is defined }}{{ tools is defined }}{{ tools is none }}{{ 'a' in missing }}{{ missing == none }}{{ missing | length }}"
                 "{% for x in missing %}x{% endfor %}{{ bos_token is defined }}{{ documents is none }}",
    "think": "{% set c = messages[2].content %}{{ c.split('</think>')[-1].lstrip('\\n') }}|{{ c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}|{{ '</think>' in c }}",
    "reverse": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}{% set i = (messages | length - 1) - loop.index0 %}"
               "{% if ns.last < 0 and m.role == 'user' and m.content is string %}{% set ns.last = i %}{% endif %}{% endfor %}{{ ns.last }}",
    "loop variables": "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }}"
                      "{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem is defined }},{% endfor %}",
    "content kinds": "{% for m in messages %}{% if m.content is string %}s{% elif m.content is mapping %}m{% elif m.content is sequence %}q"
                     "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}{% endfor %}",
    "tests": "{% for v in [1, 1.0, true, none, 'a', [], {}, (1,), missing] %}{{ v is number }}{{ v is integer }}{{ v is float }}{{ v is boolean }}"
             "{{ v is none }}{{ v is string }}{{ v is mapping }}{{ v is iterable }}{{ v is sequence }}{{ v is defined }}{{ v is true }};{% endfor %}"
             "{{ messages[1:] is sequence }}{{ range(3) is iterable }}{{ 'user' is eq 'user' }}{{ 2 is even }}{{ 'a' is in ['a'] }}",
    "filters": "{{ ' a ' | trim }}{{ 'ab' | upper | lower | capitalize | title }}{{ [3, 1, 2] | sort | join(', ') }}{{ [1, 2] | first }}{{ [1, 2] | last }}"
               "{{ 'a-b' | replace('-', '+') }}{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
               "{{ messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | join('/') }}{{ {'b': 1, 'a': 2} | dictsort }}"
               "{{ {'b': 1} | items | list }}{{ 'x' | string }}{{ '5' | int + 1 }}{{ 3.7 | int }}{{ 2.567 | round(1) }}{{ [1, none, 2] | select | list }}"
               "{{ 'a\\nb\\n\\nc\\n' | indent(2) }}{{ 'a\\n\\nb' | indent(1, true, true) }}{{ 'a\\nb' | indent('> ') }}{{ 'a\\nb' | indent(width=2, first=true) }}{{ [1, 1, 2] | unique | list }}{{ '%s-%d' | format('a', 3) }}{{ -2 | abs }}"
               "{{ [[1, 2], [3]] | map('length') | list }}{{ messages | map(attribute='role') | unique | join }}{{ [1,2,3] | max }}{{ 'ab' | length }}{{ [1, 2] | reverse | list }}",
    "methods": "{{ 'a,b,c'.split(',', 1) }}{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a  b '.split() }}{{ ' a  b c '.rsplit(None, 1) }}{{ 'abc'.removeprefix('a') }}{{ 'abc'.removesuffix('c') }}"
               "{{ 'abc'.removeprefix('x') }}{{ 'a=b=c'.partition('=') }}{{ 'a=b=c'.rpartition('=') }}{{ 'ab'.partition('=') }}{{ '-7'.zfill(4) }}{{ '7'.zfill(3) }}"
               "{{ 'ab'.center(5, '*') }}{{ 'abc'.center(6, '*') }}{{ 'a'.ljust(3, '.') }}{{ 'a'.rjust(3) }}{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('c', 'd')) }}"
               "{{ 'xxa'.lstrip('x') }}{{ 'axx'.rstrip('x') }}{{ ' a '.strip() }}{{ 'a-b'.replace('-', '+') }}{{ 'aaa'.replace('a', 'b', 1) }}{{ ', '.join(['a', 'b']) }}"
               "{{ 'ab'.upper() }}{{ 'Ab'.lower() }}{{ 'ab cd'.title() }}{{ 'ab'.capitalize() }}{{ 'abab'.count('ab') }}{{ 'abc'.find('c') }}{{ 'héc'.index('c') }}{{ '12'.isdigit() }}"
               "{{ 'a\\nb'.splitlines() }}{{ '{}-{x}'.format(1, x=2) }}{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.get('b') }}{{ [1, 2, 1].count(1) }}{{ [1, 2].index(2) }}",
    "dict": "{% for k, v in {'b': 1, 'items': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1}.keys() | list }}{{ {'a': 1}.values() | list }}"
            "{% for k, v in tools[0].function.parameters.properties.items() %}{{ k }}{% endfor %}{{ dict(a=1, b=2) }}{{ dict([('x', 1), ('y', 2)]) }}{{ dict({'a': 1}, b=2) }}"
            "{{ {'a': 1} == {'a': 1} }}{{ 'a' in {'a': 1} }}{{ {'a': 1}['a'] }}{{ {'a': 1}.a }}",
    "slices": "{{ 'abcd'[1:3] }}{{ 'abcd'[-1] }}{{ 'abcd'[::-1] }}{{ [1, 2, 3][1:] }}{{ [1, 2, 3][:-1] }}{{ messages[1:][0].role }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ [0] * 3 }}",
    "macro": "{% macro show(m, sep=': ') -%}\n{{ m.role }}{{ sep }}{% if caller %}{{ caller() }}{% endif %}\n{%- endmacro %}\n{{ show(messages[0]) }}{{ show(messages[1], sep='=') }}{% call show(messages[3]) %}body{% endcall %}",
    "set block": "{% set x %}\n a {{ messages | length }}\n{% endset %}[{{ x }}]{% set a, b = 1, 2 %}{{ a + b }}{% filter upper %}abc{% endfilter %}{% with q = 3 %}{{ q }}{% endwith %}",
    "loop controls": "{% for i in range(10) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}{% else %}none{% endfor %}"
                     "{% for i in [] %}x{% else %}empty{% endfor %}{% for i in [[1, [2]], 3] recursive %}{{ loop(i) if i is iterable else i }},{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}\n{%- generation -%}\n x \n{%- endgeneration -%}\n{% endif %}{% endfor %}",
    "raw and quotes": "{% raw %}{{ x }}{% endraw %}{{ '{{' }}{{ \"%}\" }}{{ '}}' }}{{ 'it\\'s' }}{{ 'a' 'b' }}",
    "conditions": "{{ 'a' if messages else 'b' }}{{ 'x' if false }}{{ not none }}{{ 1 < 2 < 3 }}{{ 'a' and 0 or 'c' }}{{ 1 if tools is not none and tools | length > 0 }}{{ 'b' not in 'abc' }}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{% endfor %}",
    "kwargs": "{{ enable_thinking }}{{ enable_thinking is false }}{{ level }}{{ bos_token }}{{ eos_token }}",
}
KWARGS = {"enable_thinking": False, "level": 3, "eos_token": "</s>"}


def main():
    cases = []
    for name, template in TEMPLATES.items():
        rendered, _ = render_jinja_template(
            conversations=[CHAT], tools=TOOLS if "tool" in template else None, chat_template=template,
            add_generation_prompt=True, **KWARGS)
        cases.append({"name": name, "template": template, "tools": "tool" in template, "expected": rendered[0]})
    golden = {"messages": CHAT, "tools": TOOLS, "kwargs": KWARGS, "cases": cases}
    path = pathlib.Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Public escapes and bombs: each is an error within three seconds, and none has an effect."""

# ruff: noqa: E501, Q000 (jinja in double quotes, one payload a line)

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from lmdeploy.chat.hf import HFChatTemplate
from lmdeploy.errors import RequestError, TemplateError

ESCAPES = (
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''['__cla' + 'ss__'] }}",
    "{{ ''['__cla' ~ 'ss__'] }}",
    "{{ ''[['__class__'][0]] }}",
    "{{ ().__class__.__bases__[0].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__() }}",
    "{{ {}.__class__.__init__.__globals__ }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('__cla' + 'ss__')|attr('__mro__') }}",
    "{{ ()|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ joiner.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ namespace.__init__.__globals__.os.popen('touch canary').read() }}",
    "{{ lipsum.__globals__.os.popen('touch canary').read() }}",
    "{{ lipsum.__globals__['os'].system('touch canary') }}",
    "{{ lipsum|attr('__globals__') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os }}",
    "{{ self['_TemplateReference__context'] }}",
    "{{ config.__class__.__init__.__globals__['os'].popen('touch canary').read() }}",
    "{{ request.application.__globals__.__builtins__.__import__('os').popen('touch canary').read() }}",
    "{{ url_for.__globals__ }}",
    "{{ get_flashed_messages.__globals__.__builtins__ }}",
    "{{ x.__init__.__builtins__ }}",
    "{{ range.__self__ }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception['__globals__'] }}",
    "{{ strftime_now.__globals__['datetime'] }}",
    "{{ strftime_now['__code' ~ '__'] }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ dict['mr' ~ 'o']() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__}'.format(namespace) }}",
    "{{ '{x.__init__.__globals__}'.format(x=namespace) }}",
    "{{ '{0[__class__]}'.format(raise_exception) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f('') }}",
    "{{ ['{0.__class__}']|map('format', 'x')|list }}",
    "{{ [namespace]|map(attribute='__init__.__globals__')|list }}",
    "{{ ['x']|map(attribute='__class__')|list }}",
    "{{ ['x']|selectattr('__class__')|list }}",
    "{{ ['x']|groupby('__class__')|list }}",
    "{{ ['x', 'y']|sort(attribute='__class__') }}",
    "{{ ['x']|map('attr', '__class__')|list }}",
    "{% for c in [].__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "{% set ns = namespace() %}{% set ns.__class__ = 'x' %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "{{ namespace(**{'__call__': raise_exception}) }}",
    "{{ namespace({'__html__': raise_exception}) }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m['_func'] }}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% for i in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for i in [1] %}{{ loop['_iterator'] }}{% endfor %}",
    "{{ caller.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{{ messages.sort() }}",
    "{{ 'x'.encode().decode('unicode_escape') }}",
    "{{ 'x'.encode('rot13') }}",
    "{{ (1).bit_length.__self__ }}",
    "{{ (1).real }}",
    "{{ 1.0.hex() }}",
    "{% import 'os' as os %}{{ os.system('touch canary') }}",
    "{% from 'os' import system %}",
    "{% include '/etc/passwd' %}",
    "{% extends 'x' %}",
    "{{ __import__('os').system('touch canary') }}",
    "{{ eval('1') }}",
    "{{ open('/etc/passwd').read() }}",
    "{{ exec('x = 1') }}",
    "{% set x = ''.__class__ %}",
    "{% if ''.__class__ %}{% endif %}",
    "{{ undefined_name._fail_with_undefined_error() }}",
    "{{ ('x'|safe).__html__() }}",
    "{{ 'a'.translate({97: 'b'}) }}",
    "{{ 'a'.maketrans('a', 'b') }}",
    "{% debug %}",
    "{% do messages.append(1) %}",
    "{% trans %}x{% endtrans %}",
    "{{ gettext('x') }}",
)


@pytest.mark.parametrize('payload', ESCAPES)
def test_escapes_are_errors_without_effect(payload, tmp_path, monkeypatch):
    effects: list[str] = []
    monkeypatch.chdir(tmp_path)
    for module, name in ((os, 'system'), (os, 'popen'), (subprocess, 'Popen')):
        monkeypatch.setattr(module, name, lambda *args, name=name, **kwargs: effects.append(name))
    with pytest.raises(TemplateError):
        HFChatTemplate(payload)
    assert not effects and not list(tmp_path.iterdir())


BOMBS = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ range(10**9)|list }}",
    "{{ range(0 - 10**30, 10**30, 1)|length }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "{% for i in [1] recursive %}{{ loop(range(90000)) }}{% endfor %}",
    "{% macro m(n) %}{% for i in range(9) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(30) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ ['a'] * 10**9 }}",
    "{{ [[0] * 1000] * 10**6 }}",
    "{{ ('a' * 1000000) * 1000 }}",
    "{{ 10**(10**10) }}",
    "{{ 9**(9**(9**9)) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{{ 'a'.ljust(10**9) }}",
    "{{ 'a'.rjust(10**9) }}",
    "{{ 'a'.center(10**9) }}",
    "{{ '1'.zfill(10**9) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ 'a'|center(10**9) }}",
    "{{ 'a\\nb'|indent(10**9) }}",
    "{{ 'a\\nb'|indent('x' * 1000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%.1000000000f' % 1.0 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10**9) }}",
    "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "{{ ('%(a)s' * 100000) % {'a': 'a' * 100000} }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ ('a' * 1000000)|replace('a', 'a' * 1000) }}",
    "{{ ('a' * 1000000).replace('a', 'a' * 1000) }}",
    "{{ ('a' * 1000000).replace('', 'a' * 1000) }}",
    "{{ range(100000)|join('a' * 100000) }}",
    "{{ ('a' * 100000).join('b' * 100000) }}",
    "{{ (['a' * 1000000] * 100000)|join }}",
    "{{ messages|tojson(indent=10**9) }}",
    "{{ messages|tojson(indent='x' * 1000000) }}",
    "{{ ([[[]]] * 100000)|tojson(indent=900) }}",
    "{% set ns = namespace(s='a') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s|length }}",
    "{% set ns = namespace(s='a') %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(50) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s|length }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(50) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(50) %}{% set ns.s = (ns.s, ns.s) %}{% endfor %}{{ ns.s|string }}",
    "{% set ns = namespace(s={}) %}{% for i in range(50) %}{% set ns.s = {1: ns.s, 2: ns.s} %}{% endfor %}{{ ns.s|tojson }}",
    "{% set ns = namespace(s={}) %}{% for i in range(50) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% endfor %}{{ ns.a == ns.b }}",
    "{% set ns = namespace(s=1) %}{% macro m() %}{% set ns.s = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(ns.s, ns.s) }}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=1) %}{% macro m() %}{% set ns.s = kwargs %}{% endmacro %}"
    "{% for i in range(60) %}{{ m(a=ns.s, b=ns.s) }}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s='a') %}{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% for i in range(50) %}{% set ns.s = m(ns.s) %}{% endfor %}{{ ns.s|length }}",
    "{% set ns = namespace(s='a') %}{% for i in range(50) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = x %}{% endfor %}{{ ns.s|length }}",
    "{% set x = 'a' * 4000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(9999) %}{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "{{ (['a' * 1000000] * 1000)|map('upper')|list|length }}",
    "{{ ('a,' * 9000000).split(',')|length }}",
    "{{ [range(90000)|list]|sum(start=[])|length }}",
    "{{ ('f' * 1000000)|int(base=16) // 3 }}",
    "{{ 'x' * 5000000 }}",
    "{% for i in range(90000) %}" + 'y' * 100 + "{% endfor %}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ strftime_now('%Y' * 1000000) }}",
    "{{ lipsum(n=100000) }}",
)


@pytest.mark.parametrize('bomb', BOMBS)
def test_bombs_end_at_most_a_second_after_the_limit(bomb, monkeypatch):
    monkeypatch.setattr('lmdeploy.chat.budget.SECONDS', 0.2)
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        HFChatTemplate(bomb)
    assert time.monotonic() - start < 1.2
    assert caught.value.code in ('LMD-172', 'LMD-173', 'LMD-174', 'LMD-178')


def test_the_limit_is_two_seconds():
    start = time.monotonic()
    with pytest.raises(TemplateError) as caught:
        HFChatTemplate("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert 2 <= time.monotonic() - start < 3
    assert caught.value.code == 'LMD-174' and '2 seconds' in str(caught.value)


def test_a_bomb_in_one_thread_does_not_hold_up_others():
    fine = HFChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    messages = [{'role': 'user', 'content': 'x' * 100}] * 20
    failed: list[Exception] = []

    def explode() -> None:
        try:
            HFChatTemplate("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}")
        except TemplateError as error:
            failed.append(error)

    bomb = threading.Thread(target=explode)
    bomb.start()
    slowest = 0.0
    while bomb.is_alive():
        start = time.monotonic()
        assert fine.messages2prompt(messages) == 'x' * 2000
        slowest = max(slowest, time.monotonic() - start)
    bomb.join()
    assert failed and slowest < 1


def test_limits_hold_while_a_request_is_rendered_too(monkeypatch):
    monkeypatch.setattr('lmdeploy.chat.budget.SECONDS', 0.2)
    template = HFChatTemplate("{% if messages|length > 3 %}{% for a in range(99999) %}{% for b in range(99999) %}"
                              "{% endfor %}{% endfor %}{% endif %}{{ messages[0].content }}")
    message = {'role': 'user', 'content': 'x'}
    assert template.messages2prompt([message]) == 'x'
    with pytest.raises(TemplateError) as caught:
        template.messages2prompt([message] * 4)
    assert caught.value.code == 'LMD-174' and 'seconds' in str(caught.value)
    assert template.messages2prompt([message]) == 'x'


def test_a_long_conversation_is_not_a_bomb():
    template = HFChatTemplate("{% set ns = namespace(turns=[]) %}{% for m in messages[1:] %}"
                              "{% set ns.turns = ns.turns + [m.role] %}{{ m.content | trim }}{% endfor %}")
    messages = [{'role': 'user', 'content': '书' * 3000}] * 1001
    assert len(template.messages2prompt(messages)) == 3_000_000
    with pytest.raises((TemplateError, RequestError)):
        template.messages2prompt(messages * 2)


@pytest.mark.parametrize(('expression', 'result'), [
    ("'%s: %5.2f%%' % ('x', 1.5)", 'x:  1.50%'), ("'{:>4}|{a}'.format(1, a=2)", '   1|2'),
    ("'a,b'.split(',')|join('-')", 'a-b'), ("[3, 1, 2]|sort|list", '[1, 2, 3]'), ('2**10', '1024'),
    ("'ab' * 3", 'ababab'), ("{'a': [1, 'é']}|tojson", '{"a": [1, "é"]}'),
    ("{'a': [1, 'é\U0001f600<']}|tojson(ensure_ascii=true)", '{"a": [1, "\\u00e9\\ud83d\\ude00<"]}'),
    ("{'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':'))", '{"a":2,"b":1}'),
    ("{'b': [1]}|tojson(indent=1)", '{\n "b": [\n  1\n ]\n}'), ("'a\nb'|indent(2)", 'a\n  b'),
    ("[{'a': 1}, {'a': 2}]|map(attribute='a')|list", '[1, 2]'), ("[{'a': 1}]|selectattr('a', 'eq', 1)|list|length", '1'),
    ("'x' if strftime_now('%Y')|int > 2000", 'x'), ("[1, 2]|sum", '3'), ("'aXb'|replace('X', '--')", 'a--b'),
    ("[{'k': 'a'}, {'k': 'b'}]|groupby('k')|map(attribute='grouper')|join", 'ab'), ("('<'|e) ~ '<'", '&lt;<'),
    ("dict(a=1).items()|list", "[('a', 1)]"), ("range(3)|list + [9]", '[0, 1, 2, 9]'), ("'abc'[1:]", 'bc'),
    ("messages[0].items()|map('first')|sort|join(',')", 'content,role'), ("namespace(self=1).self", '1'),
])
def test_what_templates_need_is_there(expression, result):
    assert HFChatTemplate('{{ ' + expression + ' }}').get_prompt('x') == result


def test_importing_jinja_alone_does_not_load_a_model_library():
    code = 'import sys, lmdeploy.chat.hf; print([m for m in ("torch", "transformers", "numpy") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'

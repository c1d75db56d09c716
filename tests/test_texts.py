"""Error codes and their texts agree: every code has both languages, the same parameters, and a place that raises it."""

from __future__ import annotations

import ast
import re
import string
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest

from lmdeploy import texts
from lmdeploy.errors import RequestError
from lmdeploy.texts import AREAS, LANGUAGES, table
from lmdeploy.texts.cli import NOTES
from lmdeploy.texts.fragments import FRAGMENTS, PARAMS, translate

PACKAGE = Path(__file__).resolve().parent.parent / 'lmdeploy'
CODE = re.compile(r'LMD-\d{3}')


class Use(NamedTuple):
    """A call whose first argument is a code or a note; ``params`` is None where the call does not show them."""

    where: str
    code: str
    params: set[str] | None


def placeholders(text: str) -> set[str]:
    """The parameters that a text names; ``reason_zh`` is the Chinese wording of ``reason``."""
    names = {re.split(r'[.\[]', name)[0] for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    return {name.removesuffix('_zh') for name in names}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(PACKAGE.rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call):
                yield f'{path.relative_to(PACKAGE.parent)}:{node.lineno}', node


def uses(pattern: re.Pattern[str], function: str | None = None) -> list[Use]:
    """All calls with a literal first argument that matches, of ``function`` or of anything."""
    found = []
    for where, call in calls():
        first = call.args[0] if call.args else None
        if not (isinstance(first, ast.Constant) and isinstance(first.value, str) and pattern.fullmatch(first.value)):
            continue
        if function is not None and not (isinstance(call.func, ast.Attribute) and call.func.attr == function):
            continue
        whole = len(call.args) == 1 and all(keyword.arg for keyword in call.keywords)
        params = {keyword.arg.removesuffix('_zh') for keyword in call.keywords if keyword.arg} if whole else None
        found.append(Use(where, first.value, params))
    return found


def mentioned_codes() -> set[str]:
    """Codes that stand in the package outside the texts, in calls or in tables."""
    found = set()
    for path in PACKAGE.rglob('*.py'):
        if path.parent.name != 'texts':
            for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value):
                    found.add(node.value)
    return found


def test_every_code_that_is_raised_has_a_text():
    assert sorted(mentioned_codes() - set(table())) == []


def test_every_text_is_raised_somewhere():
    assert sorted(set(table()) - mentioned_codes()) == []


def test_no_code_is_in_two_areas():
    from importlib import import_module

    codes = [code for area in AREAS for code in import_module(f'lmdeploy.texts.{area}').TEXTS]
    assert len(codes) == len(set(codes)) == len(table())
    assert all(CODE.fullmatch(code) for code in codes)


@pytest.mark.parametrize('code', sorted(table()) + sorted(NOTES))
def test_both_languages_name_the_same_parameters(code):
    entry = table().get(code) or NOTES[code]
    assert set(entry) == set(LANGUAGES)
    assert placeholders(entry['en']) == placeholders(entry['zh'])
    assert all(text.strip() == text and text for text in entry.values())
    assert re.search('[\u4e00-\u9fff]', entry['zh'])
    assert not re.search('[\u4e00-\u9fff]', entry['en'])


def test_calls_pass_what_the_texts_name():
    wrong = []
    for use in uses(CODE):
        named = placeholders(table()[use.code]['en']) if use.code in table() else set()
        if use.params is not None and not named <= use.params:
            wrong.append(f'{use.where}: {use.code} gets {sorted(use.params)}, its text names {sorted(named)}')
    assert wrong == [], '\n'.join(wrong)


def test_notes_are_used_and_get_their_parameters():
    found = uses(re.compile('[a-z_]+'), 'note') + uses(re.compile('[a-z_]+'), 'text')
    found = [use for use in found if use.where.startswith('lmdeploy/cli/')]
    assert {use.code for use in found} == set(NOTES)
    for use in found:
        assert use.params == placeholders(NOTES[use.code]['en']), use.where


def test_an_error_renders_in_both_languages_and_survives_a_copy():
    import copy

    error = copy.copy(RequestError('LMD-306', prompts=2, configs=3))
    assert str(error).startswith('LMD-306: 2 prompts came with 3 generation configs')
    assert '提示词有 2 个' in error.text('zh')
    assert type(error) is RequestError


def test_threads_that_meet_the_first_error_together_all_get_its_text(monkeypatch):
    texts.table.cache_clear()
    monkeypatch.setattr(texts, 'import_module', lambda name: time.sleep(0.002) or import_module(name))
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda _: texts.render('LMD-315', 'en', {}), range(8)))
    assert set(told) == {texts.table()['LMD-315']['en']}


FRAGMENT_HELPERS = {'bad': -1, '_bad': 1, 'not_json': 0, '_invalid': 1, 'too_large': 0}
"""Functions that make an error from an English part, and where among their arguments it stands."""
ENGLISH = re.compile(r'[A-Za-z]+ [a-z]{2,}')


def literal(node: ast.expr) -> str | None:
    """A text in the code, with an X for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(str(part.value) if isinstance(part, ast.Constant) else 'X' for part in node.values)
    return None


def fragments() -> Iterator[tuple[str, str]]:
    """All parts of messages that errors are given as they are written in the code; those of HttpError are English."""
    for where, call in calls():
        function = getattr(call.func, 'id', getattr(call.func, 'attr', ''))
        found = [keyword.value for keyword in call.keywords if keyword.arg in PARAMS]
        if function in FRAGMENT_HELPERS and call.args:
            found = call.args[FRAGMENT_HELPERS[function]:][:1]
        elif not function.endswith('Error') or function == 'HttpError':
            continue
        yield from ((where, text) for text in map(literal, found) if text is not None)


def test_no_chinese_message_holds_an_english_part():
    found = list(fragments())
    assert len(found) > 100
    left = [(where, text) for where, text in found
            if ENGLISH.search(translate(text).replace('token id', '')) and text != 'X of X']
    assert not left, 'lmdeploy/texts/fragments.py lacks these'


def test_parts_are_found_with_their_values_and_other_texts_are_left_alone():
    assert translate('a list of token ids below 303') == '由小于 303 的 token id 组成的列表'
    assert translate('foo is a int, not a text') == 'foo 的类型是 int，应为文本'
    assert translate('3 messages; system 5, last message 3') == '3 条消息；系统提示 5、最后一条消息 3'
    for text in ('', 'No such file or directory', 'system', 'a', 'what it is a list of, nobody knows', '/a text'):
        assert translate(text) == text
    for english, chinese in FRAGMENTS.items():
        assert placeholders(chinese) <= placeholders(english), english


def test_errors_tell_their_parts_in_the_language_of_the_message():
    error = RequestError('LMD-175', index=0, reason='the conversation is empty')
    assert '对话为空' in error.text('zh') and 'the conversation is empty' in error.text('en')

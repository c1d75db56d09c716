"""Questions from pipes: lines, quoted blocks, encodings."""

from __future__ import annotations

import io

import pytest

from lmdeploy.cli.args import UsageError
from lmdeploy.cli.reader import PipeReader, is_open, unquoted


def questions(data: bytes) -> list[str]:
    reader, found = PipeReader(io.BytesIO(data)), []
    while (text := reader.read()) is not None:
        found.append(text)
    return found


@pytest.mark.parametrize('data, expected', [
    (b'', []),
    (b'\n  \n', []),
    (b'one\ntwo', ['one', 'two']),
    (b'one\r\n\r\ntwo\r\n', ['one', 'two']),
    ('\ufeff你好\n'.encode(), ['你好']),
    (b'"""one\ntwo"""\nthree\n', ['one\ntwo', 'three']),
    (b'"""\ndef f():\n\n    pass\n"""\n', ['def f():\n\n    pass']),
    (b'"""short"""\n', ['short']),
    (b'"""cut\noff', ['cut\noff']),
    (b'"""\n"""\nnext\n', ['next']),
    (b'say """hi"""\n', ['say """hi"""']),
])
def test_pipe(data, expected):
    assert questions(data) == expected


def test_not_utf8_names_the_line():
    with pytest.raises(UsageError) as raised:
        questions(b'fine\n\xff\xfe\n')
    assert raised.value.code == 'LMD-405'
    assert 'line 2' in str(raised.value)


@pytest.mark.parametrize('text, state', [
    ('"""', True), ('"""a', True), ('"""a"""', False), ('""""""', False), ('a"""', False), ('  """a\n', True),
    ('"""""', True), ('"""a"""  \n', False),
])
def test_open_blocks(text, state):
    assert is_open(text) is state


def test_text_without_quotes_is_left_alone():
    assert unquoted('  print("hi")  ') == '  print("hi")  '

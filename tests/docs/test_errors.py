"""The pages of error codes are those of the package's texts."""

from __future__ import annotations

import pytest

from lmdeploy.texts import AREAS, table
from tests.docs.pages import ROOT
from tools.error_pages import TITLES, main, page


def test_the_pages_are_up_to_date(capsys):
    assert main(['--check']) == 0, capsys.readouterr().out


@pytest.mark.parametrize('lang', ['en', 'zh'])
def test_every_code_has_a_row(lang):
    text = page(lang)
    assert all(text.count(f'\n| {code} | ') == 1 for code in table())
    assert set(AREAS) <= set(TITLES)


def test_codes_in_the_pages_exist():
    import re

    for path in (ROOT / 'docs').rglob('*.md'):
        assert set(re.findall(r'LMD-\d{3}', path.read_text(encoding='utf-8'))) <= set(table()), path

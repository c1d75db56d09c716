#!/usr/bin/env python3
"""Write docs/en/errors.md and docs/zh_cn/errors.md from the texts of the package.

    python tools/error_pages.py [--check]

With ``--check`` nothing is written, and the exit code is 1 if a page is not up to date.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from lmdeploy.texts import AREAS  # noqa: E402 - the checkout's package, not an installed one

HEADS = {
    'en': """# Error codes

Every error that a user can meet has a code that stays. `str(error)` is `CODE: English text`; `error.text('zh')` is the
Chinese text, `error.params` what it names. Below, `{...}` stands for those parameters.

This page is made by `tools/error_pages.py`.
""",
    'zh': """# 错误码

用户可能遇到的每个错误都有固定的错误码。`str(error)` 为“错误码: 英文说明”；`error.text('zh')` 为中文说明，
`error.params` 为其中的参数。下表中 `{...}` 表示这些参数。

本页由 `tools/error_pages.py` 生成。
""",
}
COLUMNS = {'en': '| code | text |', 'zh': '| 错误码 | 说明 |'}
TITLES = {
    'source': ('Model sources', '模型来源'),
    'model': ('Model configuration', '模型配置'),
    'weights': ('Weight files', '权重文件'),
    'tokenizer': ('Tokenizers', '分词器'),
    'chat': ('Chat templates', '对话模板'),
    'resources': ('Memory and devices', '内存与设备'),
    'options': ('Engine options', '引擎选项'),
    'requests': ('Requests', '请求'),
    'grammar': ('Structured output', '结构化输出'),
    'engine': ('The running engine', '运行中的引擎'),
    'cli': ('Command line', '命令行'),
    'server': ('The server', '服务端'),
    'proxy': ('The proxy', '代理'),
    'client': ('Clients of the server', '客户端'),
    'bench': ('Benchmarks', '基准测试'),
    'vision': ('Models that read pictures', '读图模型'),
    'media': ('Pictures in requests', '请求中的图片'),
    'lite': ('Quantising a model', '模型量化'),
}


def page(lang: str) -> str:
    """The page in ``'en'`` or ``'zh'``."""
    parts = [HEADS[lang]]
    for area in AREAS:
        texts = import_module(f'lmdeploy.texts.{area}').TEXTS
        if texts:
            rows = [f'| {code} | {_cell(texts[code][lang])} |' for code in sorted(texts)]
            title = TITLES[area][lang == 'zh']
            parts.append('\n'.join(['', f'## {title}', '', COLUMNS[lang], '| --- | --- |', *rows, '']))
    return ''.join(parts)


def _cell(text: str) -> str:
    """A format template as a table shows it: parameters by name only, no markup of its own."""
    for spec in ('!r', ':en', ':zh'):
        text = text.replace(f'{spec}}}', '}')
    text = text.replace('{{', '{').replace('}}', '}').replace('\n', ' ')
    return ''.join(f'\\{c}' if c in '|<>*_`[]' else c for c in text)


def main(argv: list[str]) -> int:
    stale = 0
    for lang, folder in (('en', 'en'), ('zh', 'zh_cn')):
        path, text = ROOT / 'docs' / folder / 'errors.md', page(lang)
        if '--check' not in argv:
            path.write_text(text, encoding='utf-8')
        elif not path.is_file() or path.read_text(encoding='utf-8') != text:
            print(f'{path.relative_to(ROOT)} is not up to date: run python tools/error_pages.py')
            stale = 1
    return stale


if __name__ == '__main__':
    raise SystemExit(main(sys.argv[1:]))

"""Lines of text on which tokenizers differ: a deterministic mixture of scripts, code, spaces and oddities."""

from __future__ import annotations

import random
import unicodedata

WORDS = (
    'the', "don't", "I'LL", 'naïve', 'Straße', 'tokenization', 'HTTPServer2', 'snake_case', 'Ωmega', 'привет',
    'Здравствуйте', 'γειά', 'שלום', 'مرحبا', 'नमस्ते', 'สวัสดี', '안녕하세요', 'こんにちは', 'ｗｉｄｅ', 'ﬁne')
CHINESE = (
    '你好,请介绍一下你自己。', '机器学习', '书生·万象', '第123章', '「引用」', '中文English混排', '繁體字',
    '𠮷野家', '龘', '、。!?')
EMOJI = ('🙂', '👩\u200d👩\u200d👧\u200d👦', '🇨🇳', '🏳\ufe0f\u200d🌈', '👍🏽', '❤\ufe0f', '🤷🏻\u200d♀\ufe0f',
         '1\ufe0f\u20e3', '\U0001fae0')
CODE = (
    'def f(x: int) -> str:\n    return f"{x!r}"', 'for (int i=0;i<10;++i){a[i]+=1;}', 'SELECT * FROM t WHERE a>=1;',
    '<div class="x">&nbsp;</div>', 'x = [1, 2,\t3]  # 注释', '\\frac{1}{2}', 'a::b<c>&&d',
    '#!/bin/sh\nset -euo pipefail', '{"k": [null, true, 1e-9]}', 'https://example.org/a?b=c&d=%20',
    '    \tif x:\n\t\tpass', '++--**//==!=')
NUMBERS = ('0', '7', '42', '123', '1234', '1234567890', '3.14159', '1,000,000', '0x1F', '٣٤٥', '一二三', '½', '²',
           'Ⅷ', '12ab34')
COMBINING = (  # some composed, some not, some whose composed form is yet another character
    'e\u0301', 'A\u030a', 'q\u0307\u0323', 'q\u0323\u0307', '한', '\u1112\u1161\u11ab', 'क्षि',
    'Z\u0351\u036b\u0343', '\u0958', '\u2126', '\ufb01', 'ö\u0332')
CONTROL = (
    '\0', '\x01', '\x07', '\x08', '\x0b', '\x0c', '\x1b[31m', '\x7f', '\x80', '\x85', '\x9f', '\u200b', '\u200d',
    '\u200e', '\u202e', '\u2028', '\u2029', '\ufeff', '\ufffd', '\ufffe', '\U000e0041', '\u00ad', '\u2060',
    '\U0010ffff')
SPACES = (
    ' ', '  ', '   ', ' ' * 7, ' ' * 16, ' ' * 65, '\t', '\t\t\t', '\n', '\n\n', '\r\n', '\r', ' \n ', '\n    ',
    '\u00a0', '\u3000', '\u2003', ' \u00a0 ', '\u2581', '\u2581\u2581', '  \t \n\n  ')
MARKUP = (
    '<|im_start|>', '<|im_end|>', '<|endoftext|>', '<tool_call>', '</tool_call>', '<|vision_start|>', '<s>', '</s>',
    '<unk>', '<0x0A>', '[INST]', '<<SYS>>', '<|im_', 'end|>', '<|', '|>', '<repo_name>', '[PAD151665]')
KINDS = (WORDS, CHINESE, EMOJI, CODE, NUMBERS, COMBINING, CONTROL, SPACES, MARKUP)


def lines(count: int = 2000, seed: int = 0) -> list[str]:
    """The first lines are every sample by itself and after a space; the rest are random sequences of all kinds."""
    rng = random.Random(seed)
    samples = [sample for kind in KINDS for sample in kind]
    out = [*samples, *(' ' + sample for sample in samples)]
    while len(out) < count:
        out.append(''.join(_piece(rng) for _ in range(rng.randint(1, 12))))
    return out[:count]


def plain_lines(count: int = 2000, seed: int = 0) -> list[str]:
    """Lines without the texts of special tokens."""
    return [line for line in lines(2 * count, seed) if not any(mark in line for mark in MARKUP)][:count]


def _piece(rng: random.Random) -> str:
    roll = rng.random()
    if roll < 0.75:
        return rng.choice(rng.choice(KINDS)) + rng.choice(('', '', ' ', '\n', '  '))
    if roll < 0.85:
        return ''.join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 8)))
    if roll < 0.93:
        return ''.join(_any_character(rng) for _ in range(rng.randint(1, 5)))
    return rng.choice(' \n\t\r') * rng.randint(1, 40)


def _any_character(rng: random.Random) -> str:
    """Any assigned character of the lower planes; no surrogates."""
    while True:
        char = chr(rng.randrange(0x30000))
        if unicodedata.category(char) not in ('Cs', 'Cn'):
            return char

"""The vocabulary inside a GGUF file.

Byte-level vocabularies (``tokenizer.ggml.model`` = gpt2) become a BPE of the ``tokenizers`` library. The file names
the pre-tokenizer only; the table below says what each name means, after the tokenizer.json of the original models, so
that ids are those the model was trained on: single digits in SmolLM2, Unicode composition (NFC) in Qwen2, whole words
before merges in Llama 3. SentencePiece vocabularies (model llama) become a SentencePiece model again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmdeploy.errors import LoadError
from lmdeploy.log import get_logger
from lmdeploy.tokenizer.settings import Settings
from lmdeploy.tokenizer.spm import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, SpmVocabulary, spm_model
from lmdeploy.tokenizer.vocabulary import AddedToken, Vocabulary

_ROLES = {'bos': 'bos_token_id', 'eos': 'eos_token_id', 'unk': 'unknown_token_id', 'pad': 'padding_token_id'}
# Control tokens that end a text or a turn: the file has no generation_config.json, whose list names them otherwise.
_ENDS = ('<|endoftext|>', '<|end_of_text|>', '<|im_end|>', '<|eot_id|>', '<|end|>', '<end_of_turn>')
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_LLAMA3 = _CONTRACTION + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|' + _TAIL
_QWEN2 = _CONTRACTION + r'|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|' + _TAIL
_UPPER, _LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED_TAIL = r' ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
_TEKKEN = rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|' + _CASED_TAIL
_GPT4O = (rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*'
          rf'{_CONTRACTION}?|\p{{N}}{{1,3}}|' + _CASED_TAIL)
_DEEPSEEK3 = (r'\p{N}{1,3}', r'[一-龥぀-ゟ゠-ヿ]+',
              r'[!"#$%&' r"'" r'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+'
              r'| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How a byte-level vocabulary cuts text into words.

    Attributes:
        splits: patterns applied one after the other, each isolating its matches.
        digits: every digit is first cut off as a word of its own.
        nfc: text is brought to Unicode's composed form first.
        whole_words: a word that is a token is that token, whatever the merges say.
        add_bos: whether text begins with the bos token if the file says nothing.
    """

    splits: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    add_bos: bool = False


_llama3 = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_digits = PreTokenizer((_GPT2,), digits=True)
PRE_TOKENIZERS = {
    'default': PreTokenizer((_GPT2,)),
    'gpt-2': PreTokenizer((_GPT2,)),
    'llama3': _llama3,
    'llama-v3': _llama3,
    'llama-bpe': _llama3,
    'falcon3': _llama3,
    'qwen2': PreTokenizer((_QWEN2,), nfc=True),
    'deepseek-r1-qwen': PreTokenizer((_QWEN2,), nfc=True, add_bos=True),
    'smollm': _digits,
    'starcoder': _digits,
    'refact': _digits,
    'command-r': _digits,
    'tekken': PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    'gpt-4o': PreTokenizer((_GPT4O,), whole_words=True),
    'llama4': PreTokenizer((_GPT4O,), whole_words=True, add_bos=True),
    'deepseek-v3': PreTokenizer(_DEEPSEEK3, add_bos=True),
}


def load_gguf(path: Path) -> tuple[Vocabulary, Settings]:
    """The vocabulary and the settings in a GGUF file's metadata.

    Raises:
        LoadError: LMD-155 to LMD-157, LMD-154 without the sentencepiece package, and what reading the file raises.
    """
    from lmdeploy.weights.gguf import read_gguf_metadata

    return from_metadata(read_gguf_metadata(path), str(path))


def from_metadata(metadata: dict[str, Any], origin: str) -> tuple[Vocabulary, Settings]:
    """As :func:`load_gguf`, from the metadata themselves."""
    lists = _Lists(metadata, origin)
    settings = _settings(lists)
    model = metadata.get('tokenizer.ggml.model')
    if model == 'gpt2':
        return _byte_level(lists, settings), settings
    if model == 'llama':
        return _sentencepiece(lists, settings), settings
    raise LoadError('LMD-155', file=origin, model=model, known='gpt2, llama')


class _Lists:
    """The token lists of the metadata, checked against each other."""

    def __init__(self, metadata: dict[str, Any], origin: str) -> None:
        self.metadata, self.origin = metadata, origin
        self.tokens: list[str] = self.array('tokens', str)
        if not self.tokens:
            raise self.bad('tokenizer.ggml.tokens is missing or empty')
        count = len(self.tokens)
        self.types: list[int] = self.array('token_type', int) or [NORMAL] * count
        self.scores: list[float] = self.array('scores', float) or [0.0] * count
        for name, values in (('token_type', self.types), ('scores', self.scores)):
            if len(values) != count:
                raise self.bad(f'{count} tokens, but {len(values)} entries in tokenizer.ggml.{name}')

    def bad(self, reason: str) -> LoadError:
        return LoadError('LMD-157', file=self.origin, reason=reason)

    def array(self, name: str, kind: type) -> list:
        values = self.metadata.get(f'tokenizer.ggml.{name}')
        if values is None:
            return []
        if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
            raise self.bad(f'tokenizer.ggml.{name} is not an array')
        if values and not isinstance(values[0], kind):
            raise self.bad(f'tokenizer.ggml.{name} holds {type(values[0]).__name__} values, wanted {kind.__name__}')
        return list(values)

    def scalar(self, key: str, kind: type) -> Any:
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise self.bad(f'{key} is {str(value)[:60]!r}, wanted a {kind.__name__}')
        return value

    def role(self, key: str) -> int | None:
        """The id of a special token, None if it has none."""
        token = self.scalar(f'tokenizer.ggml.{key}', int)
        if token is None or token in (-1, 0xFFFFFFFF):
            return None
        if not 0 <= token < len(self.tokens):
            raise self.bad(f'tokenizer.ggml.{key} is {token}, but there are {len(self.tokens)} tokens')
        return token


def _settings(lists: _Lists) -> Settings:
    settings = Settings(origin=lists.origin)
    for name, key in _ROLES.items():
        token = lists.role(key)
        if token is not None:
            settings.named[f'{name}_token'] = lists.tokens[token]
    further = [lists.role(f'{name}_token_id') for name in ('eot', 'eom')]
    further += [i for i, (token, kind) in enumerate(zip(lists.tokens, lists.types, strict=True))
                if kind == CONTROL and token in _ENDS]
    settings.eos_ids = tuple(dict.fromkeys(token for token in further if token is not None))
    settings.add_bos = lists.scalar('tokenizer.ggml.add_bos_token', bool)
    settings.add_eos = lists.scalar('tokenizer.ggml.add_eos_token', bool) or False
    settings.add_prefix_space = lists.scalar('tokenizer.ggml.add_space_prefix', bool)
    settings.rows = lists.scalar(f'{lists.metadata.get("general.architecture")}.vocab_size', int)
    for key in lists.metadata:
        if key == 'tokenizer.chat_template' or key.startswith('tokenizer.chat_template.'):
            settings.chat_templates[key.removeprefix('tokenizer.chat_template').lstrip('.') or 'default'] = (
                lists.scalar(key, str))
    return settings


def _byte_level(lists: _Lists, settings: Settings) -> Vocabulary:
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    from lmdeploy.tokenizer.fast import FastVocabulary

    name = lists.scalar('tokenizer.ggml.pre', str)
    if name is None:
        get_logger().warning("%s names no pre-tokenizer; GPT-2's is used, which may not be the right one",
                             lists.origin)
    pre = PRE_TOKENIZERS.get(name or 'default')
    if pre is None:
        raise LoadError('LMD-156', file=lists.origin, pre=name, known=', '.join(PRE_TOKENIZERS))
    merges = [tuple(merge.split(' ')) for merge in lists.array('merges', str)]
    if not merges:
        raise lists.bad('tokenizer.ggml.merges is missing or empty')
    try:
        model = models.BPE({token: i for i, token in enumerate(lists.tokens)}, merges, ignore_merges=pre.whole_words)
    except Exception as error:  # the library raises bare Exception: a merge of unknown tokens, a merge not of two parts
        raise lists.bad(str(error)) from error
    full = tokenizers.Tokenizer(model)
    if pre.nfc:
        full.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), 'isolated') for pattern in pre.splits]
    full.pre_tokenizer = pre_tokenizers.Sequence([
        *steps, pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.add_prefix_space), use_regex=False)])
    full.decoder = decoders.ByteLevel()
    full.add_tokens([
        tokenizers.AddedToken(token.content, special=token.special, normalized=False)
        for token in _added(lists)])
    if settings.add_bos is None:
        settings.add_bos = pre.add_bos
    return FastVocabulary(full, lists.origin)


def _sentencepiece(lists: _Lists, settings: Settings) -> Vocabulary:
    unknown = lists.role('unknown_token_id')
    added = _added(lists)
    control = {token.id for token in added if token.is_control}
    tokens, types, seen = list(lists.tokens), list(lists.types), set()
    if UNKNOWN not in types:
        types[unknown or 0] = UNKNOWN
    for i, token in enumerate(tokens):
        if types[i] == USER_DEFINED:
            # The library matches these in text by itself: right for white space, not for markup.
            tokens[i], types[i] = token.replace(' ', '\u2581'), CONTROL if i in control else USER_DEFINED
        elif i in control and types[i] != UNKNOWN:
            types[i] = CONTROL
        elif types[i] not in (NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE):
            raise lists.bad(f'token {i} has type {types[i]}, wanted 1 to 6')
        if not tokens[i] or '\0' in tokens[i] or tokens[i] in seen:  # the library wants proper pieces, each once
            tokens[i], types[i] = f'<unusable {i}>', UNUSED
        seen.add(tokens[i])
    if settings.add_bos is None:
        settings.add_bos = True
    prefix = settings.add_prefix_space
    if prefix is None:
        prefix = not str(lists.metadata.get('general.architecture')).startswith('gemma')
    return SpmVocabulary(spm_model(tokens, lists.scores, types, prefix), lists.origin, added, prefix_after_added=False)


def _added(lists: _Lists) -> list[AddedToken]:
    """The tokens matched as whole strings: those with a role, then control and user-defined ones; each text once."""
    roles = [lists.role(key) for key in _ROLES.values()]
    found = {lists.tokens[i]: AddedToken(lists.tokens[i], i) for i in roles if i is not None}
    for i, (token, kind) in enumerate(zip(lists.tokens, lists.types, strict=True)):
        if token and kind in (CONTROL, USER_DEFINED):
            found.setdefault(token, AddedToken(token, i, special=kind == CONTROL))
    return sorted(found.values(), key=lambda token: token.id)

"""The tokenizer of one model: ids of text, text of ids, and what the model's files say about its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from lmdeploy.errors import LoadError, RequestError
from lmdeploy.log import get_logger
from lmdeploy.tokenizer.detokenize import Detokenizer, DetokenizeState
from lmdeploy.tokenizer.segments import SegmentEncoder
from lmdeploy.tokenizer.settings import Settings, read_settings
from lmdeploy.tokenizer.vocabulary import Vocabulary

MOST_INDEXES = 5  # more tokens than this contain the string: only those that are exactly it count


class Tokenizer:
    """Text to token ids and back.

    Args:
        model_path: a folder with tokenizer.json or tokenizer.model, or a ``.gguf`` file. Nothing in it is executed.

    Attributes:
        vocabulary: the token ids themselves.
        vocab_size: the number of ids, added tokens included.
        bos_token_id, eos_token_id, pad_token_id: None if the model has no such token.
        eos_token_ids: all ids that end a text, generation_config.json's included.
        special_tokens: tokens left out of decoded text, by content.
        added_tokens: all tokens that are matched as whole strings, by content.
        control_tokens: those of them that untrusted text never becomes, by content.
        chat_template: the model's jinja template for plain chats; ``chat_templates`` has all of them by name.
        add_bos: whether a text begins with the bos token by default.

    Raises:
        LoadError: LMD-150 to LMD-159 and LMD-161, each naming file and reason.
    """

    def __init__(self, model_path: str) -> None:
        path = Path(model_path)
        self.vocabulary, settings = _load(path)
        self.vocab_size = self.vocabulary.size
        self._segments = SegmentEncoder(self.vocabulary)
        added = self.vocabulary.added.values()
        self.added_tokens = {token.content: token.id for token in added}
        self.special_tokens = {token.content: token.id for token in added if token.special}
        self.control_tokens = {token.content: token.id for token in self._segments.control.values()}
        self.special_ids = frozenset(self.special_tokens.values())
        self.bos_token_id = self._named(settings, 'bos_token')
        self.eos_token_id = self._named(settings, 'eos_token')
        self.pad_token_id = self._named(settings, 'pad_token')
        if self.eos_token_id is None and settings.eos_ids:
            self.eos_token_id = settings.eos_ids[0]
        self.eos_token_ids = {*settings.eos_ids, *(() if self.eos_token_id is None else (self.eos_token_id,))}
        self.chat_templates = settings.chat_templates
        self.chat_template = next((settings.chat_templates[n] for n in ('default', *settings.chat_templates)
                                   if n in settings.chat_templates), None)
        named = {token for token in (self.bos_token_id, self.pad_token_id) if token is not None}
        _check_rows(self.vocabulary, settings, self.eos_token_ids | named)
        self._prefix, self._suffix = self._affixes(settings)
        self.add_bos = bool(self._prefix)
        self._texts: list[str] = []

    def encode(self, s: str, add_bos: bool = True, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; control tokens spelled out in it are recognised.

        Args:
            add_bos: begin with the bos token, if the model wants one; False in the middle of a session.
            add_special_tokens: add what the model puts around a text (bos, and eos or a separator for some) at all.

        Raises:
            RequestError: LMD-160 (a lone surrogate), LMD-163 (not a str).
        """
        ids = self.vocabulary.encode(_checked(s))
        if not add_special_tokens:
            return ids
        return [*(self._prefix if add_bos else ()), *ids, *self._suffix]

    def encode_segments(self, segments: Iterable[tuple[str, bool]], add_bos: bool = True) -> list[int]:
        """Ids of (text, trusted) segments as one text, where untrusted text never becomes a control token.

        Apart from that the ids are those of the joined text. With ``add_bos`` the bos token comes first if the model
        wants one, and only once if the trusted text already spells it.

        Raises:
            RequestError: LMD-160, LMD-163.
        """
        ids = self._segments.encode([(_checked(text), trusted) for text, trusted in segments])
        if add_bos and self._prefix and ids[:len(self._prefix)] != self._prefix:
            return [*self._prefix, *ids]
        return ids

    def decode(self, ids: Sequence[int], offset: int | None = None, skip_special_tokens: bool = True) -> str:
        """Text of ids, from number ``offset`` on; bytes that are no UTF-8 become U+FFFD, unknown ids nothing."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.push(ids[offset:] if offset else ids) + detokenizer.flush()

    def detokenize_incrementally(self, all_input_ids: Sequence[int], state: DetokenizeState,
                                 skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True,
                                 ) -> tuple[str, DetokenizeState]:
        """The text that the ids since the last call add; an incomplete character waits for the next call.

        Args:
            all_input_ids: all ids so far, the earlier ones unchanged.
            state: what the last call returned; at first ``DetokenizeState(number of prompt ids)``.
        """
        return state.read(self, all_input_ids, skip_special_tokens, spaces_between_special_tokens), state

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, which need not be whole characters; none for an unknown id."""
        return self.vocabulary.token_bytes(token)

    def token_piece(self, token: int) -> str:
        """The token as the vocabulary writes it (``'Ġthe'``, ``'▁the'``, ``'<0x0A>'``); empty for an unknown id."""
        return self.vocabulary.piece(token) or ''

    def indexes_containing_token(self, token: str) -> list[int]:
        """Ids of the tokens whose text contains ``token``, for words that must end or never enter an answer.

        If more than five contain it, those that are exactly it; empty, with a warning, if no token does.
        """
        if not self._texts:
            self._texts = [self.token_bytes(i).decode('utf-8', 'replace') for i in range(self.vocab_size)]
        found = [i for i, text in enumerate(self._texts) if token in text] if token else []
        if len(found) > MOST_INDEXES:
            found = [i for i in found if self._texts[i] == token]
        if not found:
            get_logger().warning('no single token is %r, so it cannot be used as a stop or bad token', token)
        return found

    def _named(self, settings: Settings, name: str) -> int | None:
        content = settings.named.get(name)
        if content is None:
            return None
        token = self.vocabulary.find(content)
        if token is None:
            raise LoadError('LMD-159', file=settings.origin, field=name, token=content)
        return token

    def _affixes(self, settings: Settings) -> tuple[list[int], list[int]]:
        """Ids put before and after a text: as the settings say, else as the file's post-processor does."""
        if settings.add_bos is None and settings.add_eos is None:
            from lmdeploy.tokenizer.fast import FastVocabulary

            if isinstance(self.vocabulary, FastVocabulary):
                return self.vocabulary.affixes
        prefix = [self.bos_token_id] if settings.add_bos and self.bos_token_id is not None else []
        suffix = [self.eos_token_id] if settings.add_eos and self.eos_token_id is not None else []
        return prefix, suffix


def _load(path: Path) -> tuple[Vocabulary, Settings]:
    if path.suffix == '.gguf' or path.is_file():
        from lmdeploy.tokenizer.gguf_vocab import load_gguf

        return load_gguf(path)
    if (path / 'tokenizer.json').is_file():
        from lmdeploy.tokenizer.fast import load_fast

        settings = read_settings(path)
        return load_fast(path / 'tokenizer.json', settings), settings
    if (path / 'tokenizer.model').is_file():
        from lmdeploy.tokenizer.spm import load_spm

        settings = read_settings(path)
        return load_spm(path / 'tokenizer.model', settings), settings
    refused = [p.name for pattern in ('tokeniz*.py', '*.tiktoken', 'tokenizer*.pkl', 'tokenizer*.pickle')
               for p in sorted(path.glob(pattern))]
    if refused:
        raise LoadError('LMD-158', path=path, files=', '.join(refused))
    raise LoadError('LMD-150', path=path)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError('LMD-163', given=type(text).__name__)
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise RequestError('LMD-160', position=error.start, point=ord(text[error.start])) from error
    return text


def _check_rows(vocabulary: Vocabulary, settings: Settings, special: set[int]) -> None:
    """Every token must have an embedding row. Added tokens without a role may lack one: multimodal vocabularies are
    shared with text-only models, whose texts never contain such a token."""
    if settings.rows is None:
        return
    optional = {token.id for token in vocabulary.added.values()} - special
    for token in sorted({*range(settings.rows, vocabulary.size), *special}):
        if token >= settings.rows and token not in optional and (token in special or vocabulary.piece(token)):
            raise LoadError('LMD-153', token=vocabulary.piece(token) or '', id=token, file=settings.origin,
                            rows=settings.rows)

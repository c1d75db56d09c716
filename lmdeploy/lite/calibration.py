"""Calibration tokens: windows of a corpus in the model's own ids."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmdeploy.chat.template import ChatTemplate
from lmdeploy.errors import ConfigError
from lmdeploy.lite.corpora import Corpus, Document
from lmdeploy.tokenizer import Tokenizer

LEAST = 16  # tokens of a corpus
CHARACTERS = 6  # of a token, more than usual


@dataclass(frozen=True, slots=True)
class Calibration:
    """Samples of token ids.

    Attributes:
        sequences: ``[length] int64`` each.
        name: of the corpus that they really are from. replaced: why it is not the one asked for.
    """

    sequences: tuple[Tensor, ...]
    name: str
    replaced: str = ''

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    @property
    def digest(self) -> str:
        """sha256 of all ids, by which runs with equal data know each other."""
        digest = hashlib.sha256()
        for ids in self.sequences:
            digest.update(np.int64(len(ids)).tobytes() + ids.numpy().tobytes())
        return digest.hexdigest()


class Sampler:
    """Cuts windows out of corpora.

    Args:
        template: renders conversations; None: the corpus must not hold any.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template

    def sample(self, corpus: Corpus, samples: int, length: int, seed: int = 0) -> Calibration:
        """``samples`` windows of ``length`` tokens, in an order that the seed decides; of several parts, in turns.

        A corpus that is too short gives fewer or shorter ones.

        Raises:
            ConfigError: LMD-609: it is nearly empty.
        """
        parts = corpus.parts or [corpus]
        found: list[Tensor] = []
        streams = [self._windows(part, length, random.Random(f'{seed} {i}')) for i, part in enumerate(parts)]
        for i in range(samples):
            window = next(streams[i % len(streams)], None)
            if window is not None:
                found.append(window)
        if not found or sum(map(len, found)) < LEAST:
            raise ConfigError('LMD-609', name=corpus.name, found=sum(map(len, found)), wanted=length)
        found.sort(key=len, reverse=True)  # equal lengths side by side
        return Calibration(tuple(found), corpus.name, corpus.replaced)

    def head(self, corpus: Corpus, tokens: int, length: int) -> Calibration:
        """The first ``tokens`` tokens of a corpus, in windows of ``length``; fewer if there are not so many."""
        ids: list[int] = []
        for document in corpus.documents:
            ids += self.encode(document, bool(ids), corpus.joined)
            if len(ids) >= tokens:
                break
        whole = min(len(ids), tokens) // length or 1
        windows = [torch.tensor(ids[i * length : (i + 1) * length]) for i in range(whole)]
        return Calibration(tuple(w for w in windows if len(w) > 1), corpus.name, corpus.replaced)

    def encode(self, document: Document, inside: bool, joined: str = '') -> list[int]:
        """Ids of one document; control tokens arise from the chat template only."""
        if not isinstance(document, str):
            if self.template is None:
                raise ValueError('conversations need a chat template')
            add_bos = self.template.add_bos and not inside
            return self.tokenizer.encode_segments(self.template.render(document), add_bos=add_bos)
        return self.tokenizer.encode_segments([(joined + document if inside else document, False)], add_bos=not inside)

    def _windows(self, corpus: Corpus, length: int, chance: random.Random) -> Iterator[Tensor]:
        """Windows from random places on, documents joined; each place at most once."""
        documents: Sequence[Document] = corpus.documents
        if not documents:
            return
        starts = list(range(len(documents)))
        chance.shuffle(starts)
        for start in starts:
            ids: list[int] = []
            for i in range(len(documents)):
                document = documents[(start + i) % len(documents)]
                if isinstance(document, str) and len(document) > 2 * CHARACTERS * length:
                    first = chance.randrange(len(document) - CHARACTERS * length)
                    document = document[first : first + CHARACTERS * length]
                ids += self.encode(document, bool(ids), corpus.joined)
                if len(ids) >= length:
                    break
            yield torch.tensor(ids[:length])
            if len(ids) < length:
                return  # all documents together are no whole window

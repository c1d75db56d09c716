"""The settings that ``/set`` shows and changes."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from lmdeploy.errors import RequestError
from lmdeploy.frontend.params import check
from lmdeploy.messages import GenerationConfig

FIELDS = ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty', 'presence_penalty', 'frequency_penalty',
          'max_new_tokens', 'min_new_tokens', 'random_seed', 'do_sample', 'ignore_eos', 'stop_words', 'bad_words',
          'skip_special_tokens')
WORDS = {'on': True, 'True': True, 'off': False, 'False': False, 'none': None, 'None': None}


@dataclass(frozen=True, slots=True)
class Settings:
    """How answers are generated, and whether each is followed by its speed; a value: changing makes a new one.

    Attributes:
        names: the fields of ``gen`` that can be changed.
    """

    gen: GenerationConfig
    verbose: bool = False
    names: tuple[str, ...] = FIELDS

    def change(self, assignments: list[str], vocab_size: int) -> Settings:
        """The settings after ``['temperature=0.2', ...]``; all are applied, or none.

        Raises:
            RequestError: an unknown name (LMD-402), a value that is none (LMD-403) or out of range (LMD-310 ...).
        """
        verbose, changes = self.verbose, {}
        for assignment in assignments:
            name, _, text = assignment.partition('=')
            if name not in (*self.names, 'verbose'):
                raise RequestError('LMD-402', name=name, known=', '.join((*self.names, 'verbose')))
            value = _value(name, text)
            if name != 'verbose':
                changes[name] = value
            elif isinstance(value, bool):
                verbose = value
            else:
                raise RequestError('LMD-403', name=name, value=text, what='on / off')
        gen = replace(self.gen, **changes)
        check(gen, vocab_size)
        return Settings(gen, verbose, self.names)

    def lines(self) -> list[str]:
        """One line for each setting, in the form in which ``/set`` takes it."""
        values = {name: getattr(self.gen, name) for name in self.names} | {'verbose': self.verbose}
        return [f'{name}={json.dumps(value, ensure_ascii=False, separators=(",", ":"))}'
                for name, value in values.items()]


def _value(name: str, text: str) -> Any:
    if text in WORDS:
        return WORDS[text]
    try:
        return json.loads(text)
    except ValueError:
        raise RequestError('LMD-403', name=name, value=text, what='0.5 / 100 / on / off / none / ["a","b"]') from None

"""GenerationConfig -> SamplingParams: the one place where a request's numbers are checked and resolved."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lmdeploy.engine.sampling import SamplingParams
from lmdeploy.errors import RequestError
from lmdeploy.frontend.bad_words import BadWords, Decoder
from lmdeploy.grammar.formats import read_format
from lmdeploy.messages import GenerationConfig

MAX_WORDS, MAX_WORD_LEN = 128, 1024
MAX_IDS = 4096
MAX_LOGPROBS = 1024
SEEDS = 1 << 64
# Logits are divided by both in single precision, where what is much smaller becomes 0 or makes them infinite.
MIN_TEMPERATURE = 1e-5  # below it the best token has all of the mass: it is taken without drawing
MIN_PENALTY = 1e-3
DEFAULTS = GenerationConfig()
UNSUPPORTED = ('migration_request', 'with_cache', 'preserve_cache', 'return_ppl', 'return_routed_experts',
               'repetition_ngram_size', 'repetition_ngram_threshold', 'logprob_start_len')


class Vocabulary(Decoder, Protocol):
    """What this module needs of a tokenizer."""

    eos_token_ids: Iterable[int]
    control_tokens: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class TextRules:
    """How tokens become the answer's text."""

    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    continues: bool  # the answer goes on from a raw prompt: its first space is kept


def check(gen: GenerationConfig, vocab_size: int) -> None:
    """Refuse what no request can mean.

    Raises:
        RequestError: LMD-310 (a number outside its range, or not a number), LMD-311 (a list too long or of the wrong
            kind), LMD-312 (a choice that is none), LMD-313 (a feature that this version has not), LMD-320 to LMD-324
            and LMD-328 (response_format).
    """
    if not isinstance(gen, GenerationConfig):
        raise RequestError('LMD-314', given=type(gen).__name__)
    _whole(gen, 'n', 1, 128)
    _whole(gen, 'max_new_tokens', 0, 1 << 24, none=True)
    _whole(gen, 'min_new_tokens', 0, 1 << 24, none=True)
    _whole(gen, 'top_k', 0, vocab_size)
    _whole(gen, 'logprobs', 0, min(MAX_LOGPROBS, vocab_size), none=True)
    _whole(gen, 'random_seed', -SEEDS, SEEDS - 1, none=True)
    _real(gen, 'top_p', 0, 1, open_low=True)
    _real(gen, 'min_p', 0, 1)
    _real(gen, 'temperature', 0, 2)
    _real(gen, 'repetition_penalty', MIN_PENALTY, 10)
    _real(gen, 'presence_penalty', -2, 2)
    _real(gen, 'frequency_penalty', -2, 2)
    for name in ('stop_words', 'bad_words'):
        _words(gen, name)
    for name in ('stop_token_ids', 'bad_token_ids'):
        _ids(name, getattr(gen, name), vocab_size)
    if gen.logit_bias is not None:
        if not isinstance(gen.logit_bias, dict):
            raise RequestError('LMD-311', field='logit_bias', what='a dict from token id to number', most=MAX_IDS)
        _ids('logit_bias', list(gen.logit_bias), vocab_size)
        for value in gen.logit_bias.values():
            _number('logit_bias', value, -100, 100)
    for name in ('output_logits', 'output_last_hidden_state'):
        if getattr(gen, name) not in (None, 'all', 'generation'):
            raise RequestError('LMD-312', field=name, value=_short(getattr(gen, name)),
                               choices="None, 'all', 'generation'")
    for name in ('do_sample', 'ignore_eos', 'skip_special_tokens', 'spaces_between_special_tokens',
                 'include_stop_str_in_output'):
        if not isinstance(getattr(gen, name), bool):
            raise RequestError('LMD-312', field=name, value=_short(getattr(gen, name)), choices='True, False')
    processors = gen.logits_processors
    if processors is not None and not (isinstance(processors, (list, tuple)) and all(map(callable, processors))):
        raise RequestError('LMD-311', field='logits_processors', what='a list of functions', most=MAX_WORDS)
    if read_format(gen.response_format) is not None and gen.ignore_eos:
        raise RequestError('LMD-328')
    for name in UNSUPPORTED:
        if getattr(gen, name) != getattr(DEFAULTS, name):
            raise RequestError('LMD-313', field=name)


def resolve(gen: GenerationConfig, tokenizer: Vocabulary, template_stops: Sequence[str], *, prompt_len: int,
            session_len: int, continues: bool = False) -> tuple[list[SamplingParams], TextRules]:
    """The sampling parameters of each of the ``n`` answers, and the rules for their text.

    End tokens are the tokenizer's, the template's and the request's together. A stop word that is one control token
    ends the answer as a token; any other is found in the text. Without ``do_sample`` decoding is greedy; penalties,
    bans and biases act all the same, since their defaults are neutral.
    """
    words = [*template_stops, *(gen.stop_words or ())]
    stop_ids = {*tokenizer.eos_token_ids, *(gen.stop_token_ids or ())}
    stop_ids.update(tokenizer.control_tokens[word] for word in words if word in tokenizer.control_tokens)
    stops = tuple(dict.fromkeys(word for word in words if word not in tokenizer.control_tokens))
    banned = set(gen.bad_token_ids or ())
    if gen.ignore_eos:
        banned |= stop_ids
        stop_ids = set()
    room = session_len - prompt_len
    processors = tuple(gen.logits_processors or ())
    if gen.bad_words:
        processors += (BadWords(gen.bad_words, tokenizer, prompt_len),)
    greedy = not gen.do_sample or gen.temperature < MIN_TEMPERATURE or gen.top_k == 1
    seed = gen.random_seed if gen.random_seed is not None else secrets.randbits(63)
    params = SamplingParams(
        max_new_tokens=room if gen.max_new_tokens is None else gen.max_new_tokens,
        greedy=greedy,
        temperature=1.0 if greedy else float(gen.temperature),
        top_k=0 if greedy else gen.top_k,
        top_p=1.0 if greedy else float(gen.top_p),
        min_p=0.0 if greedy else float(gen.min_p),
        repetition_penalty=float(gen.repetition_penalty),
        presence_penalty=float(gen.presence_penalty),
        frequency_penalty=float(gen.frequency_penalty),
        seed=seed % SEEDS,
        min_new_tokens=gen.min_new_tokens or 0,
        stop_ids=tuple(sorted(stop_ids)),
        banned_ids=tuple(sorted(banned)),
        logit_bias=tuple((gen.logit_bias or {}).items()),
        logprobs=-1 if gen.logprobs is None else gen.logprobs,
        output_logits=gen.output_logits,
        output_hidden=gen.output_last_hidden_state,
        logits_processors=processors,
    )
    rules = TextRules(stops=() if gen.ignore_eos and not gen.stop_words else stops,
                      include_stop=gen.include_stop_str_in_output,
                      skip_special_tokens=gen.skip_special_tokens,
                      spaces_between_special_tokens=gen.spaces_between_special_tokens, continues=continues)
    return [replace(params, seed=(seed + i) % SEEDS) for i in range(gen.n)], rules


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise RequestError('LMD-310', field=name, value=_short(value), low=low, high=high)


def _real(gen: GenerationConfig, name: str, low: float, high: float, *, open_low: bool = False) -> None:
    _number(name, getattr(gen, name), low, high, open_low=open_low)


def _whole(gen: GenerationConfig, name: str, low: int, high: int, *, none: bool = False) -> None:
    value = getattr(gen, name)
    if value is None and none:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError('LMD-310', field=name, value=_short(value), low=low, high=high)


def _words(gen: GenerationConfig, name: str) -> None:
    words = getattr(gen, name)
    if words is None:
        return
    if isinstance(words, str) or not isinstance(words, (list, tuple)) or len(words) > MAX_WORDS or not all(
            isinstance(w, str) and 0 < len(w) <= MAX_WORD_LEN for w in words):
        raise RequestError('LMD-311', field=name, most=MAX_WORDS,
                           what=f'a list of non-empty texts of at most {MAX_WORD_LEN} characters')


def _ids(name: str, ids: Any, vocab_size: int) -> None:
    if ids is None:
        return
    if not isinstance(ids, (list, tuple)) or len(ids) > MAX_IDS or not all(
            isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size for i in ids):
        raise RequestError('LMD-311', field=name, what=f'a list of token ids below {vocab_size}', most=MAX_IDS)

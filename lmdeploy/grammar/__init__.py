"""Structured output: what an answer may look like, as masks over the vocabulary.

A request's ``response_format`` is read and checked (:mod:`~lmdeploy.grammar.formats`, ``schema``, ``regex``), becomes a
:class:`~lmdeploy.grammar.formats.Source`, is tried out in a process that may be killed (``sandbox``), compiled for the
model's vocabulary (``compiler``), and then gives one :class:`~lmdeploy.grammar.matcher.Matcher` per answer, which the
engine asks for the allowed tokens of each step. In front of an engine in another process a grammar is tried out only
(``checker``); it is compiled there. What cannot be honoured exactly is refused: an answer is never left
unconstrained.

The automata are those of the package ``llguidance``, which is imported with the first grammar only.
"""

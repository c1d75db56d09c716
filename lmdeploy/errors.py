"""Errors are data: a stable code, named parameters, and a text in two languages.

Every error that a user can meet is raised as ``SomeError('LMD-123', name=value, ...)``. The code picks the entry of
:mod:`lmdeploy.texts` that says what happened, why, and what to do; ``str(error)`` is the English text (logs stay
English), :meth:`LmdeployError.text` gives the other language. Code ranges:

====  ==========================================================
101   model sources: paths, hubs, packages, downloads
110   model configuration: architectures, rope types, sizes
120   weight files: headers, shards, tensors
150   tokenizers
170   chat templates
201   resources: memory, devices
220   public engine options
301   requests: prompts, limits, sampling parameters
320   structured output
330   the running engine
401   command line
501   the server
560   the proxy
580   clients of the server
600   quantising a model
====  ==========================================================
"""

from __future__ import annotations


class LmdeployError(Exception):
    """Base of all errors that carry a code.

    Args:
        code: a key of :mod:`lmdeploy.texts`, such as ``'LMD-101'``.
        params: the values that the text names.
    """

    def __init__(self, code: str, **params: object) -> None:
        from lmdeploy.texts import render

        self.code = code
        self.params = params
        super().__init__(render(code, 'en', params))

    def text(self, lang: str = 'en') -> str:
        """The message in ``'en'`` or ``'zh'``, without the code."""
        from lmdeploy.texts import render

        return render(self.code, lang, self.params)

    def __str__(self) -> str:
        return f'{self.code}: {self.args[0]}'

    def __reduce__(self):  # keyword-only construction survives copy and transport
        return (_rebuild, (type(self), self.code, self.params))


def _rebuild(cls: type[LmdeployError], code: str, params: dict) -> LmdeployError:
    return cls(code, **params)


class SourceError(LmdeployError):
    """A model could not be found or fetched."""


class ConfigError(LmdeployError, ValueError):
    """An option of the user, or a model's config.json, cannot be honoured; raised before anything heavy loads."""


class BindError(ConfigError):
    """A server cannot have the address that it is told to listen on."""


class LoadError(LmdeployError):
    """A weight or tokenizer file is missing, truncated, corrupt or not what the model needs."""


class TemplateError(LmdeployError):
    """A chat template is unknown, refused by the sandbox, or failed while rendering."""


class RequestError(LmdeployError):
    """One request fails; the engine lives on."""


class EngineDead(LmdeployError):
    """The engine cannot go on: every pending request fails with this error."""

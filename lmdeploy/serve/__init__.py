"""The HTTP server: what clients ask in the OpenAI form and others, answered by the engine.

``lmdeploy.serve`` is this package, and the public function that starts a server: calling the package calls
:func:`lmdeploy.api.serve`. Importing a submodule would otherwise hide the function.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module('lmdeploy.api').serve(*args, **kwargs)


sys.modules[__name__].__class__ = _Package

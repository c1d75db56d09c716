"""The environment variables that the package knows; nothing else reads ``os.environ``.

==========================  ==================================================================
``LMDEPLOY_CACHE``          folder for downloaded models
``LMDEPLOY_LANG``           language of the messages: ``en`` or ``zh``
``LMDEPLOY_USE_MODELSCOPE`` ``true``: ``org/name`` means a ModelScope model
``LMDEPLOY_LOG_LEVEL``      log level by name; ``TM_LOG_LEVEL`` is its older spelling
``MODELSCOPE_DOMAIN``       another ModelScope site (a host name or a URL)
``LMDEPLOY_API_KEYS``       keys of the server, separated by commas; unlike those of a flag, ``ps`` does not show them
``LMDEPLOY_NODE_KEY``       key with which servers register at a proxy
``SSL_KEYFILE``             the server's private key for ``--ssl``, PEM
``SSL_CERTFILE``            its certificate, PEM
==========================  ==================================================================

Libraries read their own: huggingface_hub ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_TOKEN``; pip ``PIP_*``; both, and
the ModelScope client, ``HTTPS_PROXY``.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """The folder for downloaded models: ``LMDEPLOY_CACHE``, else ``lmdeploy`` below the user's cache folder."""
    chosen = os.environ.get('LMDEPLOY_CACHE')
    if chosen:
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get('XDG_CACHE_HOME')
    return (Path(shared) if shared and Path(shared).is_absolute() else Path.home() / '.cache') / 'lmdeploy'


def language() -> str | None:
    """``LMDEPLOY_LANG``, ``'zh_CN'`` counts as ``'zh'``; None: not set, or a language that we do not speak."""
    code = os.environ.get('LMDEPLOY_LANG', '').strip().lower()[:2]
    return code if code in ('en', 'zh') else None


def locale_language() -> str:
    """The language of the user's locale: ``'zh'`` for Chinese, else ``'en'``."""
    for name in ('LC_ALL', 'LC_MESSAGES', 'LANG'):
        value = os.environ.get(name)
        if value:
            return 'zh' if value.lower().startswith('zh') else 'en'
    return 'en'


def use_modelscope() -> bool:
    """Whether ``LMDEPLOY_USE_MODELSCOPE`` is ``true`` or ``1``: ``org/name`` is then looked up on ModelScope."""
    return os.environ.get('LMDEPLOY_USE_MODELSCOPE', '').strip().lower() in ('1', 'true')


def log_level() -> str | None:
    """``LMDEPLOY_LOG_LEVEL`` or ``TM_LOG_LEVEL`` in upper case; None: not set."""
    level = os.environ.get('LMDEPLOY_LOG_LEVEL') or os.environ.get('TM_LOG_LEVEL') or ''
    return level.strip().upper() or None


def modelscope_endpoint() -> str:
    """Base URL of ModelScope, without a slash at its end; ``MODELSCOPE_DOMAIN`` names another site."""
    domain = os.environ.get('MODELSCOPE_DOMAIN', '').strip().rstrip('/') or 'www.modelscope.cn'
    return domain if '://' in domain else f'https://{domain}'


def api_keys() -> list[str]:
    """``LMDEPLOY_API_KEYS``: the keys between its commas."""
    return [key.strip() for key in os.environ.get('LMDEPLOY_API_KEYS', '').split(',') if key.strip()]


def node_key() -> str | None:
    """``LMDEPLOY_NODE_KEY``; None: not set."""
    return os.environ.get('LMDEPLOY_NODE_KEY', '').strip() or None


def tls_files() -> tuple[str | None, str | None]:
    """``SSL_KEYFILE`` and ``SSL_CERTFILE``."""
    return os.environ.get('SSL_KEYFILE'), os.environ.get('SSL_CERTFILE')


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a child process: this one's with ``changes``."""
    return {**os.environ, **changes}

"""Who sends a request: API keys as digests, compared in constant time, and what each kind of key may do."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from lmdeploy.errors import ConfigError
from lmdeploy.serve.errors import HttpError

MAX_KEY_BYTES = 4096
CALLER = b'x-lmdeploy-caller'
"""In which a trusted proxy names its caller; of others it means nothing."""
MAX_CALLER = 200
Headers = Sequence[tuple[bytes, bytes]]


class Access(Enum):
    """What a route asks of its callers. There is no default: every route states one."""

    OPEN = 'open'  # anybody
    USER = 'user'  # a key, if the server has keys
    ADMIN = 'admin'  # an admin key; without any, whoever reaches a server started with --enable-admin


@dataclass(frozen=True, slots=True)
class Caller:
    """One who may send requests.

    Attributes:
        id: stable and public: stands in logs and metrics, and tells nothing of the key.
        admin: may use the administrative routes.
        salt: parts the prefix cache, so that nobody learns from timing what others ask.
        keyed: came with a key.
    """

    id: str = 'anonymous'
    admin: bool = False
    salt: bytes = b''
    keyed: bool = False


@dataclass(frozen=True, slots=True, repr=False)
class _Key:
    digest: bytes
    caller: Caller


class KeyRing:
    """The keys of a server. They are kept as SHA-256 digests only.

    Args:
        api_keys: for inference; none: the server is open.
        admin_keys: for administrative routes, and for inference too.
        enable_admin: without admin keys, open the administrative routes to all who may use the others.
    """

    def __init__(self, api_keys: Iterable[str] = (), admin_keys: Iterable[str] = (), *,
                 enable_admin: bool = False) -> None:
        keys = {key: False for key in api_keys} | {key: True for key in admin_keys}
        self._keys = [_key(key, admin) for key, admin in keys.items()]
        self._required = any(not admin for admin in keys.values()) or bool(keys)
        self._has_admin_keys = any(keys.values())
        self._proxy: _Key | None = None
        self._enable_admin = enable_admin

    @property
    def required(self) -> bool:
        """Whether inference needs a key."""
        return self._required

    def authenticate(self, headers: Headers, access: Access) -> Caller:
        """The caller of a request to a route of ``access``.

        Raises:
            HttpError: LMD-504, no key or a wrong one; LMD-505, not an admin key.
        """
        caller = self.identify(headers, access)
        self.permit(caller, access)
        return caller

    def identify(self, headers: Headers, access: Access) -> Caller:
        """Who it is, whether or not they may call the route.

        Raises:
            HttpError: LMD-504, no key or a wrong one.
        """
        if access is Access.OPEN:
            return Caller()
        caller = self._proxied(headers) or self._caller(headers)
        if caller is None:
            if self._required:
                raise HttpError('LMD-504')
            caller = Caller()
        return caller

    def permit(self, caller: Caller, access: Access) -> None:
        """Raises: HttpError LMD-505, they may not."""
        if access is Access.ADMIN and not caller.admin and (self._has_admin_keys or not self._enable_admin):
            raise HttpError('LMD-505')

    def _caller(self, headers: Headers) -> Caller | None:
        """The owner of one of the keys that the headers carry. All keys are visited, whichever fits."""
        found: Caller | None = None
        for given in _given(headers):
            digest = hashlib.sha256(given).digest()
            for key in self._keys:
                if hmac.compare_digest(key.digest, digest):
                    found = key.caller
        return found

    def trust_proxy(self, key: str) -> None:
        """Let a proxy that has ``key`` speak for its own callers, whom it names in :data:`CALLER`: each of them has the
        limits, the prefix cache and the sessions of a caller with a key. By itself it is an administrator."""
        self._proxy = _key(key, True)

    def _proxied(self, headers: Headers) -> Caller | None:
        """The caller for whom a proxy speaks."""
        proxy = self._proxy
        if proxy is None or not any(hmac.compare_digest(proxy.digest, hashlib.sha256(given).digest())
                                    for given in _given(headers)):
            return None
        names = [value for name, value in headers if name.lower() == CALLER]
        if not names:
            return proxy.caller
        name = names[0].decode('latin-1')[:MAX_CALLER]
        return Caller(f'proxy-{hashlib.sha256(name.encode()).hexdigest()[:12]}', keyed=True,
                      salt=hashlib.sha256(b'proxied' + name.encode()).digest()[:16])

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f'KeyRing({len(self._keys)} keys)'


def _key(text: str, admin: bool) -> _Key:
    raw = text.encode('utf-8', 'surrogateescape')
    if not text.strip() or len(raw) > MAX_KEY_BYTES or text != text.strip():
        raise ConfigError('LMD-527', option='--api-keys', value='...',
                          reason=f'a key has 1 to {MAX_KEY_BYTES} bytes and no spaces around it')
    digest = hashlib.sha256(raw).digest()
    public = hashlib.sha256(b'id' + digest).hexdigest()[:12]
    salt = hashlib.sha256(b'salt' + digest).digest()[:16]
    return _Key(digest, Caller(f'key-{public}', admin, salt, keyed=True))


def gives_key(headers: Headers) -> bool:
    """Whether the headers carry something that is meant as a key."""
    return bool(_given(headers))


def _given(headers: Headers) -> list[bytes]:
    """The keys in ``Authorization: Bearer`` and ``x-api-key``: one of each is looked at, repeated ones are refused."""
    keys = []
    for wanted in (b'authorization', b'x-api-key'):
        values = [value for name, value in headers if name.lower() == wanted]
        if len(values) != 1:
            continue
        value = values[0].strip(b' ')
        if wanted == b'authorization':
            scheme, _, value = value.partition(b' ')
            if scheme.lower() != b'bearer':
                continue
            value = value.strip(b' ')
        if 0 < len(value) <= MAX_KEY_BYTES:
            keys.append(value)
    return keys


def read_keys(path: str | Path, option: str) -> list[str]:
    """The keys of a file, one a line; empty lines and lines that begin with ``#`` do not count.

    Raises:
        ConfigError: LMD-528, the file cannot be read or holds no key.
    """
    try:
        lines = Path(path).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError('LMD-528', path=str(path), option=option, reason=str(error)) from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith('#')]
    if not keys:
        raise ConfigError('LMD-528', path=str(path), option=option, reason='it holds no key')
    return keys

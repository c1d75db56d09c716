"""Media: the pictures of a client's messages, loaded before the frontend sees them.

A client names a picture by a ``data:`` URL or base64 text, by an ``http(s)`` URL, or, below a folder that the operator
has allowed, by a ``file:`` URL. Fetching and decoding happen in bounded pools apart from the event loop. A client
learns that a picture could not be had, and never why: what was reached is none of its business, and decoders' messages
have told addresses before.
"""

from __future__ import annotations

import asyncio
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from lmdeploy.errors import RequestError
from lmdeploy.frontend.prompts import Prompt
from lmdeploy.log import get_logger
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.limits import Limits

if TYPE_CHECKING:
    from PIL import Image

    from lmdeploy.vl.fetch import Fetcher, Network, Resolve

DECODERS = 2  # threads
SIDE, ASPECT = 16_384, 200.0
IMAGE_KINDS = ('image_url', 'image', 'input_image', 'image_data')


@dataclass(frozen=True, slots=True)
class MediaRules:
    """What the operator allows.

    Attributes:
        urls: pictures may be fetched.
        domains: only of these hosts (``.suffix``: all below it); empty: of any public one.
        networks: addresses that may be reached although they are not public.
        folder: below which ``file:`` URLs are read; None: none is.
    """

    urls: bool = True
    domains: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    folder: Path | None = None

    @property
    def allowed(self) -> str:
        """The forms that are taken, for clients."""
        forms = ['data:']
        if self.urls:
            forms += ['http:', 'https:']
        return ', '.join(forms if self.folder is None else [*forms, 'file:'])


class Media:
    """Loads pictures for one server.

    Args:
        resolve: the addresses of a name; None: the system's.
    """

    def __init__(self, rules: MediaRules, limits: Limits, *, resolve: Resolve | None = None) -> None:
        self.rules, self.limits = rules, limits
        self._resolve = resolve
        self._fetcher: Fetcher | None = None
        self._pool = ThreadPoolExecutor(DECODERS, thread_name_prefix='lmdeploy-decode')

    async def load(self, prompt: Prompt) -> Prompt:
        """``prompt`` with pictures of Pillow's in the place of what its messages name.

        Raises:
            HttpError, RequestError: LMD-678 to LMD-680 and LMD-683: a picture cannot be had.
        """
        if not prompt.has_pictures:
            return prompt
        messages = [dict(message) if isinstance(message, dict) else message for message in prompt.messages or []]
        parts = [(index, message, at) for index, message in enumerate(messages) if isinstance(message, dict)
                 and isinstance(message.get('content'), list) for at, part in enumerate(message['content'])
                 if isinstance(part, dict) and part.get('type', 'text') != 'text']
        self.limits.check('images', len(parts), 'messages')
        loaded, total_bytes, total_pixels = [], 0, 0
        for index, message, at in parts:
            part = message['content'][at]
            source, options = _source(index, part)
            data = await self._bytes(index, source)
            total_bytes += len(data)
            self.limits.check('images_bytes', total_bytes, 'messages')
            image = await self._decode(index, data)
            total_pixels += image.width * image.height
            self.limits.check('images_pixels', total_pixels, 'messages')
            loaded.append((message, at, {**options, 'type': 'image', 'image': image}))
        for message, at, part in loaded:
            message['content'] = [*message['content'][:at], part, *message['content'][at + 1:]]
        return replace(prompt, messages=messages)

    def close(self) -> None:
        """Load no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._fetcher is not None:
            self._fetcher.close()

    async def _bytes(self, index: int, source: str) -> bytes:
        """The stored picture."""
        from lmdeploy.vl.fetch import Refused

        scheme = source[:8].partition(':')[0].lower()
        try:
            if scheme in ('http', 'https') and self.rules.urls:
                return await self._fetch().fetch(source)
            if scheme == 'file' and self.rules.folder is not None:
                return await asyncio.get_running_loop().run_in_executor(
                    self._pool, read_below, self.rules.folder, source, self.limits.image_bytes)
        except Refused as refused:
            get_logger().warning('a picture was not fetched: %s', refused)
            raise HttpError('LMD-678', index=index, seconds=self.limits.fetch_seconds, most=self.limits.image_bytes,
                            param='messages') from None
        except OSError as error:
            get_logger().warning('a picture was not read: %s', error)
            raise HttpError('LMD-679', index=index, allowed=self.rules.allowed, param='messages') from None
        if scheme != 'data' and (':' in source[:64] or '/' == source[:1] or len(source) < 32):
            raise HttpError('LMD-679', index=index, allowed=self.rules.allowed, param='messages')
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._inline, index, source, scheme)

    def _inline(self, index: int, source: str, scheme: str) -> bytes:
        from lmdeploy.vl.load import FORMATS, ImageLimits, decode_base64, decode_data_url

        limits = ImageLimits(bytes=self.limits.image_bytes)
        try:
            return decode_data_url(source, limits) if scheme == 'data' else decode_base64(source, limits)
        except RequestError:
            raise HttpError('LMD-683', index=index, formats=', '.join(FORMATS), param='messages') from None

    async def _decode(self, index: int, data: bytes) -> Image.Image:
        from lmdeploy.vl.load import FORMATS, ImageLimits, decode_image

        limits = ImageLimits(self.limits.image_bytes, self.limits.image_pixels, SIDE, ASPECT)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, decode_image, data, limits)
        except RequestError as error:
            get_logger().info('a picture was refused: %s', error)
            raise HttpError('LMD-683', index=index, formats=', '.join(FORMATS), param='messages') from None

    def _fetch(self) -> Fetcher:
        if self._fetcher is None:
            from lmdeploy.vl.fetch import Fetcher, FetchRules, resolve

            rules = FetchRules(self.rules.domains, self.rules.networks, self.limits.image_bytes,
                               float(self.limits.fetch_seconds))
            self._fetcher = Fetcher(rules, resolve=self._resolve or resolve)
        return self._fetcher


def only_loaded(source: Any) -> Any:
    """Takes the pictures that :class:`Media` has loaded, and nothing that a client has named."""
    if isinstance(source, (str, bytes, os.PathLike)):
        raise RequestError('LMD-670', given=type(source).__name__)
    return source


def _source(index: int, part: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """What a part names, and its options."""
    kind = part['type']
    if kind not in IMAGE_KINDS:
        raise RequestError('LMD-674', index=index, kind=str(kind)[:100])
    inner = part.get('image_url' if kind == 'input_image' else kind, part.get('data'))
    options = {name: value for name, value in part.items() if name not in (kind, 'type', 'image_url', 'data')}
    if isinstance(inner, dict):
        options |= {name: value for name, value in inner.items() if name not in ('url', 'data')}
        inner = inner.get('url', inner.get('data'))
    if not isinstance(inner, str):
        raise RequestError('LMD-675', index=index, kind=kind, reason='its picture is missing')
    return inner, options


def read_below(folder: Path, url: str, most: int) -> bytes:
    """A regular file below ``folder``, to which no part of the path is a link.

    Raises:
        OSError: there is none.
    """
    found = urlsplit(url)
    steps = unquote(found.path).split('/')
    inside = folder.absolute().parts[1:]
    names = tuple(step for step in steps if step)
    if (found.netloc not in ('', 'localhost') or found.query or found.fragment or names[:len(inside)] != inside
            or len(names) == len(inside) or any(step in ('.', '..') or '\0' in step for step in steps)):
        raise PermissionError(f'not below {folder}')
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[len(inside):-1]:
            below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=held)
            os.close(held)
            held = below
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=held)
    finally:
        os.close(held)
    with os.fdopen(file, 'rb') as opened:
        status = os.fstat(opened.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            raise PermissionError('no regular file, or too large')
        return opened.read(most)

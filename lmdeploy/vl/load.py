"""load_image: from wherever a picture is to an RGB picture of 8 bits, upright, or an error that says why not.

A picture is opened by the five decoders of :data:`FORMATS` and no others, and its header is checked against
:class:`ImageLimits` before a pixel is decoded. Of an animation the first frame is taken; what is transparent lies on
white, as a viewer shows it.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.error import URLError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import url2pathname

import numpy as np
from PIL import Image, ImageOps

from lmdeploy.errors import RequestError
from lmdeploy.version import __version__

FORMATS = ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP')
FETCH_SECONDS = 10.0
LEAST_BASE64 = 32  # characters; shorter text that is no file is a file's wrong name
_CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """The most that one picture may be.

    Attributes:
        bytes: as stored.
        pixels: width times height.
        side: of the longer side, in pixels.
        aspect: longer side by shorter side.
    """

    bytes: int = 256 << 20
    pixels: int = 100_000_000
    side: int = 65_535
    aspect: float = 1000.0


OWN = ImageLimits()
"""For pictures that the program's user names."""


def load_image(source: str | os.PathLike[str] | bytes | Image.Image, *, limits: ImageLimits = OWN) -> Image.Image:
    """A picture as RGB.

    Args:
        source: a file's path, a ``file:``, ``http:``, ``https:`` or ``data:`` URL, base64 text, the bytes of a file, or
            a picture of Pillow's.

    Raises:
        RequestError: LMD-665 there is no such file, LMD-666 it cannot be fetched, LMD-667 it is no picture or a damaged
            one, LMD-668 or LMD-669 it is too large, LMD-670 ``source`` is none of the above, LMD-671 the base64 text
            is damaged.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, limits)
        return upright(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return decode_image(bytes(source), limits)
    if isinstance(source, os.PathLike):
        return decode_image(_read(Path(source), limits), limits, os.fspath(source))
    if not isinstance(source, str):
        raise RequestError('LMD-670', given=type(source).__name__)
    scheme = source[:8].partition(':')[0].lower()
    if scheme == 'data':
        return decode_image(decode_data_url(source, limits), limits)
    if scheme in ('http', 'https'):
        return decode_image(_fetch(source, limits), limits, source)
    if scheme == 'file':
        return decode_image(_read(Path(url2pathname(urlsplit(source).path)), limits), limits, source)
    if len(source) < 4096 and os.path.exists(source):
        return decode_image(_read(Path(source), limits), limits, source)
    if len(source) >= LEAST_BASE64 and not set(source[:64]) & set('.:\\ '):
        return decode_image(decode_base64(source, limits), limits)
    raise RequestError('LMD-665', source=source[:200], reason='no such file')


def decode_image(data: bytes, limits: ImageLimits = OWN, source: str = '') -> Image.Image:
    """The picture in the bytes of a file; ``source`` names it in errors. Raises as :func:`load_image`."""
    if len(data) > limits.bytes:
        raise RequestError('LMD-669', size=len(data), most=limits.bytes)
    named = f'{source[:200]!r}' if source else f'{len(data)} bytes'
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image.size, limits)
        return upright(image)
    except RequestError:
        raise
    except Image.DecompressionBombError:
        raise RequestError('LMD-668', width='?', height='?', pixels=limits.pixels, side=limits.side) from None
    except Exception as error:  # decoders raise nearly anything for damaged files
        raise RequestError('LMD-667', source=named, formats=', '.join(FORMATS)) from error


def upright(image: Image.Image) -> Image.Image:
    """The first frame in RGB of 8 bits, turned as its EXIF data say; transparent pixels lie on white."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith('I'):
        return _of_many_bits(np.asarray(image).astype(np.int64), image.mode)
    if image.mode == 'F':
        return _of_many_bits(np.nan_to_num(np.asarray(image)), image.mode)
    if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
        rgba = image.convert('RGBA')
        return Image.alpha_composite(Image.new('RGBA', rgba.size, (255, 255, 255, 255)), rgba).convert('RGB')
    return image if image.mode == 'RGB' else image.convert('RGB')


def _of_many_bits(grey: np.ndarray, mode: str) -> Image.Image:
    """Grey levels of 16 bits, or of 0 to 1, 255 or 65535, whichever holds them all."""
    top = float(grey.max(initial=0))
    full = 65535.0 if mode.startswith('I;16') else next((most for most in (1.0, 255.0, 65535.0) if top <= most), top)
    levels = np.clip(grey / full * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert('RGB')


def decode_data_url(url: str, limits: ImageLimits = OWN) -> bytes:
    """The bytes of a ``data:`` URL.

    Raises:
        RequestError: LMD-669, LMD-671.
    """
    head, comma, data = url.partition(',')
    if not comma:
        raise RequestError('LMD-671')
    if head.lower().endswith(';base64'):
        return decode_base64(data, limits)
    if len(data) > 3 * limits.bytes:
        raise RequestError('LMD-669', size=len(data), most=limits.bytes)
    return unquote_to_bytes(data)


def decode_base64(text: str, limits: ImageLimits = OWN) -> bytes:
    """The bytes of base64 text, which may have line ends.

    Raises:
        RequestError: LMD-669, LMD-671.
    """
    if len(text) // 4 * 3 > limits.bytes + len(text) // 32:
        raise RequestError('LMD-669', size=len(text) // 4 * 3, most=limits.bytes)
    try:
        return base64.b64decode(''.join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise RequestError('LMD-671') from None


def encode_image_base64(image: str | os.PathLike[str] | bytes | Image.Image) -> str:
    """A picture as base64 text, for a request to a server: of its file as it is, of Pillow's as PNG.

    Raises:
        RequestError: as :func:`load_image`.
    """
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, 'PNG')
        return base64.b64encode(buffer.getvalue()).decode()
    if isinstance(image, (bytes, bytearray)):
        return base64.b64encode(bytes(image)).decode()
    if isinstance(image, str) and image.lower().startswith(('http:', 'https:')):
        return base64.b64encode(_fetch(image, OWN)).decode()
    return base64.b64encode(_read(Path(image), OWN)).decode()


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise RequestError('LMD-667', source=f'{width} x {height} pixels', formats=', '.join(FORMATS))
    short, long = sorted(size)
    if width * height > limits.pixels or long > limits.side or long > limits.aspect * short:
        raise RequestError('LMD-668', width=width, height=height, pixels=limits.pixels, side=limits.side)


def _read(path: Path, limits: ImageLimits) -> bytes:
    try:
        if not path.is_file():
            raise RequestError('LMD-665', source=path, reason='no such file')
        if path.stat().st_size > limits.bytes:
            raise RequestError('LMD-669', size=path.stat().st_size, most=limits.bytes)
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise RequestError('LMD-665', source=path, reason=getattr(error, 'strerror', None) or error) from error


def _fetch(url: str, limits: ImageLimits) -> bytes:
    """What lies at a URL that the program's user named; a server has a fetcher of its own for those of its clients."""
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
                    urllib.request.HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={'User-Agent': f'lmdeploy/{__version__}'})
    try:
        with opener.open(request, timeout=FETCH_SECONDS) as reply:
            return _read_within(reply, limits, time.monotonic() + FETCH_SECONDS)
    except (URLError, OSError, ValueError) as error:
        raise RequestError('LMD-666', url=url[:200], reason=getattr(error, 'reason', None) or error) from error


def _read_within(reply: BinaryIO, limits: ImageLimits, deadline: float) -> bytes:
    data = bytearray()
    while chunk := reply.read(_CHUNK):
        data += chunk
        if len(data) > limits.bytes:
            raise RequestError('LMD-669', size=len(data), most=limits.bytes)
        if time.monotonic() > deadline:
            raise TimeoutError(f'it takes more than {FETCH_SECONDS:.0f} s')
    return bytes(data)

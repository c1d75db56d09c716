"""load_image: every source, every kind of picture, and errors that say why."""

from __future__ import annotations

import base64
import io
import random
import struct
import threading
import time
import warnings
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from lmdeploy.errors import RequestError
from lmdeploy.vl import load_image
from lmdeploy.vl.load import ImageLimits, decode_image
from lmdeploy.vl.utils import encode_image_base64


def stored(image, kind='PNG', **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(width=8, height=6):
    """Red at the top left, blue at the bottom right, on grey."""
    image = Image.new('RGB', (width, height), (100, 100, 100))
    image.putpixel((0, 0), (255, 0, 0))
    image.putpixel((width - 1, height - 1), (0, 0, 255))
    return image


def refused(source, **options):
    with pytest.raises(RequestError) as caught:
        load_image(source, **options)
    assert caught.value.text('zh') != caught.value.text('en')
    return caught.value.code


@pytest.fixture
def url():
    """Of a server on loopback that has the picture at /ok, and nothing elsewhere."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == '/ok' else 404)
            self.end_headers()
            self.wfile.write(stored(corners()))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()


def test_every_source_gives_the_same_picture(tmp_path, url):
    path, data = tmp_path / 'a b.png', stored(corners())
    path.write_bytes(data)
    text = base64.b64encode(data).decode()
    wanted = np.asarray(corners())
    for source in (path, str(path), path.as_uri(), data, bytearray(data), text, '\n'.join([text[:40], text[40:]]),
                   f'data:image/png;base64,{text}', corners(), f'{url}/ok', encode_image_base64(path),
                   encode_image_base64(corners()), encode_image_base64(f'{url}/ok')):
        found = load_image(source)
        assert found.mode == 'RGB' and np.array_equal(np.asarray(found), wanted)
    assert base64.b64decode(encode_image_base64(path)) == data


def test_what_is_no_source_says_so(tmp_path, url):
    assert refused('no/such/file.png') == refused(tmp_path) == refused(tmp_path / 'x') == 'LMD-665'
    assert refused(f'{url}/missing') == refused('http://127.0.0.1:1/x') == refused('http://') == 'LMD-666'
    assert refused(b'') == refused(b'hello') == refused(stored(corners())[:-30]) == refused('A' * 64) == 'LMD-667'
    assert refused(7) == refused(None) == 'LMD-670'
    assert refused('data:image/png;base64,@@@@') == refused('data:image/png') == refused('*' * 64) == 'LMD-671'


def test_limits_are_checked_before_pixels_are(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(stored(corners()))
    for source in (path, path.read_bytes(), encode_image_base64(path)):
        assert refused(source, limits=ImageLimits(bytes=20)) == 'LMD-669'
    for limits in (ImageLimits(pixels=47), ImageLimits(side=7), ImageLimits(aspect=1.2)):
        assert refused(path, limits=limits) == refused(corners(), limits=limits) == 'LMD-668'
    load_image(path, limits=ImageLimits(pixels=48, side=8, aspect=1.4))


def bomb(width, height):
    """A PNG of a few kilobytes that would become ``width`` times ``height`` pixels."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    rows = zlib.compress(bytes(1 << 20), 9)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 1, 0, 0, 0, 0)) + chunk(
        b'IDAT', rows) + chunk(b'IEND', b'')


def test_bombs_are_refused_at_once_and_take_no_memory():
    import resource

    limits = ImageLimits(20 << 20, 40_000_000, 16_384, 200.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((12_000, 12_000), (65_000, 65_000), (16_384, 2_500), (1, 16_385), (2**31 - 1, 1), (20_000, 90)):
        begin = time.perf_counter()
        with pytest.raises(RequestError), warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            decode_image(bomb(*size), limits)
        assert time.perf_counter() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top is at the right
    found = load_image(stored(corners(), 'JPEG', exif=exif, quality=100, subsampling=0))
    assert found.size == (6, 8)
    red = np.asarray(found)[..., 0].astype(int) - np.asarray(found)[..., 1]
    assert np.unravel_index(red.argmax(), red.shape) == (0, 5)


def test_what_is_transparent_lies_on_white():
    clear = Image.new('RGBA', (4, 4), (0, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    grey = Image.new('LA', (4, 4), (0, 0))
    palette = Image.new('P', (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info['transparency'] = 0
    for image in (clear, grey, palette):
        assert load_image(stored(image)).getpixel((3, 3)) == (255, 255, 255)
    assert load_image(stored(clear)).getpixel((0, 0)) == (255, 0, 0)
    half = load_image(Image.new('RGBA', (1, 1), (0, 0, 0, 128))).getpixel((0, 0))
    assert all(120 < level < 135 for level in half)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'LAB', 'HSV', 'LA', 'PA', 'I', 'F',
                                  'I;16'])
def test_every_mode_becomes_rgb(mode):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8)
    if mode == 'I;16':
        image = Image.fromarray(levels * 1000)
    elif mode in ('I', 'F'):
        image = Image.fromarray((levels * 4).astype(np.int32 if mode == 'I' else np.float32))
    else:
        image = Image.fromarray((levels * 4).astype(np.uint8)).convert('RGB').convert(mode)
    found = np.asarray(load_image(image))
    assert found.shape == (8, 8, 3) and found.dtype == np.uint8
    if mode not in ('1', 'P', 'PA', 'LAB', 'HSV'):  # which lose much by themselves
        assert np.abs(found[..., 1].astype(int) - levels * (1000 / 257 if mode == 'I;16' else 4)).max() <= 3


def test_sixteen_bits_and_cmyk_survive_their_files():
    levels = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    found = np.asarray(load_image(stored(Image.fromarray(levels))))
    assert np.abs(found[..., 0] - levels / 257).max() <= 1
    cmyk = Image.new('CMYK', (8, 8), (0, 255, 255, 0))
    red = load_image(stored(cmyk, 'JPEG', quality=100)).getpixel((4, 4))
    assert red[0] > 200 and red[1] < 60


def test_of_animations_the_first_frame_is_taken():
    frames = [Image.new('RGB', (4, 4), colour) for colour in ('red', 'green', 'blue')]
    for kind in ('GIF', 'PNG', 'WEBP'):
        options = {'lossless': True} if kind == 'WEBP' else {}
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert load_image(data).getpixel((1, 1)) == (255, 0, 0)


def test_damaged_files_are_errors_of_one_kind():
    rng, originals = random.Random(0), []
    for kind in ('PNG', 'JPEG', 'WEBP', 'GIF', 'BMP'):
        originals.append(stored(Image.effect_noise((40, 30), 60).convert('RGB'), kind))
    codes = set()
    for n in range(600):
        data = bytearray(originals[n % 5])
        for _ in range(rng.choice([1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.4:
            del data[rng.randrange(len(data)):]
        if rng.random() < 0.2:
            data += originals[rng.randrange(5)][rng.randrange(20):]
        try:
            assert decode_image(bytes(data), ImageLimits(1 << 20, 1 << 20, 4096, 200.0)).mode == 'RGB'
        except RequestError as error:
            codes.add(error.code)
    assert codes <= {'LMD-667', 'LMD-668', 'LMD-669'} and 'LMD-667' in codes

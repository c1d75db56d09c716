"""Videos: which frames are taken, and how they are shown."""

from __future__ import annotations

import builtins
import io

import av
import numpy as np
import pytest
from PIL import Image

from lmdeploy.errors import RequestError
from lmdeploy.vl import load_video
from lmdeploy.vl.constants import IMAGE_TOKEN
from lmdeploy.vl.video import chosen_frames, frames_prompt


def test_frames_are_the_middles_of_equal_parts():
    assert chosen_frames(100, 4, 25.0, None) == [12, 37, 62, 87]
    assert chosen_frames(3, 8, 25.0, None) == [0, 1, 2]
    assert chosen_frames(100, 32, 25.0, 1.0) == [12, 37, 62, 87]
    assert chosen_frames(100, 2, 25.0, 10.0) == [25, 75]
    assert chosen_frames(1, 32, 0.0, 2.0) == [0]


def test_a_prompt_names_its_frames():
    frames = [Image.new('RGB', (4, 4))] * 3
    (message,) = frames_prompt('what happens?', frames)
    text, *shown = message['content']
    assert text['text'] == f'Frame1: {IMAGE_TOKEN}\nFrame2: {IMAGE_TOKEN}\nFrame3: {IMAGE_TOKEN}\nwhat happens?'
    assert len(shown) == 3 and all(part['max_dynamic_patch'] == 1 for part in shown)


def video(count=20):
    """Frames that grow lighter."""
    buffer = io.BytesIO()
    with av.open(buffer, 'w', format='avi') as container:
        stream = container.add_stream('mjpeg', rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, 'yuvj420p'
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 12 * i, np.uint8), format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_frames_of_a_file(tmp_path):
    data = video()
    (tmp_path / 'a.avi').write_bytes(data)
    for source in (data, tmp_path / 'a.avi', str(tmp_path / 'a.avi')):
        frames = load_video(source, num_frames=4)
        assert [frame.size for frame in frames] == [(32, 16)] * 4
        levels = [frame.getpixel((5, 5))[0] for frame in frames]
        assert all(abs(level - 12 * number) < 8 for level, number in zip(levels, (2, 7, 12, 17)))
    assert len(load_video(data, fps=2)) == 4


def test_what_is_no_video_says_so(tmp_path):
    for source in (b'', b'hello' * 50, tmp_path / 'none.avi', tmp_path):
        with pytest.raises(RequestError) as caught:
            load_video(source)
        assert caught.value.code == 'LMD-682'


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == 'av':
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(RequestError) as caught:
        load_video(b'x')
    assert caught.value.code == 'LMD-681' and 'lmdeploy[video]' in str(caught.value)

"""load_video: frames of a video, evenly spaced, and the message that shows them to a model.

The package ``av`` decodes; it comes with the extra ``video`` and is imported with the first video. Only frames that are
asked for are converted, and decoding stops behind the last of them.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lmdeploy.errors import RequestError
from lmdeploy.vl.constants import IMAGE_TOKEN
from lmdeploy.vl.load import OWN, ImageLimits, upright

MAX_FRAMES = 1024
MAX_DECODED = 1 << 20  # frames that are looked at in one video


def load_video(source: str | os.PathLike[str] | bytes, num_frames: int = 32, fps: float | None = None, *,
               limits: ImageLimits = OWN) -> list[Image.Image]:
    """Frames of a video, as pictures in RGB.

    Args:
        source: a file's path, or the bytes of one.
        num_frames: how many at most: the middles of equal parts of the video.
        fps: frames per second of the video's time, of which there are ``num_frames`` at most; None: the whole video.

    Raises:
        RequestError: LMD-681 the extra is not installed, LMD-682 it cannot be read, LMD-668 its frames are too large.
    """
    try:
        import av
    except ImportError:
        raise RequestError('LMD-681') from None
    named = '' if isinstance(source, (bytes, bytearray)) else os.fspath(source)
    if not 1 <= num_frames <= MAX_FRAMES or (fps is not None and not fps > 0):
        raise RequestError('LMD-682', source=named[:200],
                           reason=f'num_frames must be from 1 to {MAX_FRAMES}, fps above 0')
    try:
        data = Path(named).read_bytes() if named else bytes(source)  # type: ignore[arg-type]
        if len(data) > limits.bytes:
            raise RequestError('LMD-669', size=len(data), most=limits.bytes)
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            if stream.codec_context.width * stream.codec_context.height > limits.pixels:
                raise RequestError('LMD-668', width=stream.codec_context.width, height=stream.codec_context.height,
                                   pixels=limits.pixels, side=limits.side)
            total = _count(container, stream)
            rate = float(stream.average_rate or 0)
            wanted = chosen_frames(total, num_frames, rate, fps)
            container.seek(0)
            return _take(container, stream, wanted)
    except (OSError, IndexError, ValueError, av.FFmpegError) as error:
        raise RequestError('LMD-682', source=named[:200], reason=error) from error


def chosen_frames(total: int, num_frames: int, rate: float, fps: float | None) -> list[int]:
    """Which of ``total`` frames are taken, in order: the middle of each of equal parts.

    Args:
        rate: frames per second that the video has.
    """
    count = min(num_frames, total)
    if fps is not None and rate > 0:
        count = max(1, min(count, round(total / rate * fps)))
    return [int((i + 0.5) * total / count) for i in range(count)]


def frames_prompt(question: str, frames: Sequence[Any]) -> list[dict[str, Any]]:
    """One message that shows frames, each named and as a single tile, and asks about them."""
    lines = ''.join(f'Frame{i}: {IMAGE_TOKEN}\n' for i in range(1, len(frames) + 1))
    shown = [{'type': 'image', 'image': frame, 'max_dynamic_patch': 1} for frame in frames]
    return [{'role': 'user', 'content': [{'type': 'text', 'text': lines + question}, *shown]}]


def _count(container: Any, stream: Any) -> int:
    """Frames of the stream; where its header does not say, they are counted without being decoded."""
    if 0 < stream.frames <= MAX_DECODED:
        return stream.frames
    found = sum(1 for packet in container.demux(stream) if packet.size)
    if not 0 < found <= MAX_DECODED:
        raise ValueError(f'it has {found} frames')
    return found


def _take(container: Any, stream: Any, wanted: Sequence[int]) -> list[Image.Image]:
    found: list[Image.Image] = []
    for number, frame in enumerate(container.decode(stream)):
        while len(found) < len(wanted) and wanted[len(found)] == number:
            found.append(upright(frame.to_image()))
        if len(found) == len(wanted):
            return found
    if not found:
        raise ValueError('it has no frame that can be decoded')
    return found  # a header that promised more than there is

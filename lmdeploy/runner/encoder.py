"""PictureEncoder: a rank's vision encoder, and the embeddings of pictures that it keeps by their digests.

It does what plans say: forget, encode some tiles, hand embeddings to the decoder. What is kept, and for how long, is
decided by :mod:`lmdeploy.engine.pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lmdeploy.config.vision import VisionModelConfig
from lmdeploy.engine.plan import Encode, PictureRoom, Place, StepPlan
from lmdeploy.log import get_logger
from lmdeploy.models.vision.encoder import VisionEncoder
from lmdeploy.runner.batch import ImageEmbeds
from lmdeploy.runner.graphs import Record
from lmdeploy.runner.tables import send
from lmdeploy.runner.tile_graphs import TileGraphs, records

KEPT_BYTES = {'cpu': 256 << 20, 'cuda': 1 << 30}  # of embeddings
LEAST_KEPT, MOST_KEPT = 8192, 1 << 16  # tokens: more than the largest picture has; enough for many
PATCHES_ALONE = {'cpu': 2048, 'cuda': 32 << 10}  # of a step, while nobody waits for text
# operations per byte: a decode step reads all weights of the decoder, and encoding may take as long as that
BALANCE = {'cpu': 8, 'cuda': 100}


@dataclass(slots=True)
class _Picture:
    """Features of the tiles so far, and at last the embeddings ``[tokens, hidden]``."""

    parts: list[Tensor] = field(default_factory=list)
    tiles: int = 0
    embeddings: Tensor | None = None


class PictureEncoder:
    """Encodes and keeps pictures on one device."""

    def __init__(self, encoder: VisionEncoder) -> None:
        self.encoder: VisionEncoder = encoder
        self.device, self.dtype = encoder.build.device, encoder.build.dtype
        self._pictures: dict[bytes, _Picture] = {}

    def record(self, record: Record) -> None:
        """Calls with few tiles are recorded from now on, where that can be."""
        if not records(self.encoder):
            return
        try:
            self.encoder = TileGraphs(self.encoder, record)
        except torch.OutOfMemoryError:
            get_logger().warning('there is no memory for graphs of the vision encoder: it runs without them')

    def run(self, plan: StepPlan) -> None:
        """Forget and encode pictures as ``plan`` says.

        Raises:
            RuntimeError, MemoryError: memory ran out, and nothing has changed but what was forgotten.
        """
        for digest in plan.forget:
            self._pictures.pop(digest, None)
        if plan.encode:
            features = self.encoder([self._upload(encode.pixels) for encode in plan.encode])
            for encode, part in zip(plan.encode, features):
                self._take(encode, part)

    def lose(self, plan: StepPlan) -> None:
        """The pictures of ``plan`` could not be encoded: nobody shall find a part of one."""
        for encode in plan.encode:
            self._pictures.pop(encode.picture, None)

    def embeds(self, places: Sequence[Place]) -> ImageEmbeds:
        """The embeddings of a step's tokens.

        Raises:
            MemoryError: there was none to encode one of the pictures.
        """
        values = []
        for place in places:
            picture = self._pictures.get(place.picture)
            if picture is None or picture.embeddings is None:
                raise MemoryError('a picture of this step was not encoded')
            values.append(picture.embeddings[place.offset:place.offset + place.count])
        rows = np.concatenate([np.arange(place.token, place.token + place.count) for place in places])
        return ImageEmbeds(send(self.device, rows.astype(np.int32))[0].long(), torch.cat(values))

    def _take(self, encode: Encode, features: Tensor) -> None:
        picture = self._pictures.setdefault(encode.picture, _Picture())
        picture.parts.append(features)
        picture.tiles += len(encode.pixels)
        if picture.tiles == encode.layout.tiles:
            # a copy: a part is a view of what the whole step has encoded
            picture.embeddings = self.encoder.join(torch.cat(picture.parts), encode.layout)
            picture.parts = []

    def _upload(self, pixels: np.ndarray) -> Tensor:
        if self.device.type == 'cpu':
            return torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        staged = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
        staged.numpy()[...] = pixels
        return staged.to(self.device, non_blocking=True)

    def peak_bytes(self) -> int:
        """Bytes of a GPU that a step takes which encodes as much as it may; run twice, as what is compiled or allocated
        once and for all does not count."""
        self._largest()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self._largest()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_reserved(self.device) - before
        torch.cuda.empty_cache()
        return peak

    @torch.inference_mode()
    def _largest(self) -> None:
        config = self.encoder.config
        side = config.tower.image_size
        tiles = max(1, PATCHES_ALONE[self.device.type] // max(1, config.patches_per_tile))
        if not side:  # pictures of their own shape: a single one of the most pixels
            unit = config.tower.patch_size * config.tower.merge
            side, tiles = max(1, math.isqrt(min(config.picture.max_pixels, MOST_NATIVE)) // unit) * unit, 1
        self.encoder([torch.zeros(tiles, 3, side, side, dtype=torch.uint8, device=self.device)])


MOST_NATIVE = 28 * 28 * 4096  # pixels of the picture in its own shape that memory is measured with


def picture_room(config: VisionModelConfig, device: str, itemsize: int, decoder_bytes: int, encoder_parameters: int,
                 pictures: int | None) -> PictureRoom:
    """What a device keeps of pictures, and how many patches a step may have.

    Args:
        decoder_bytes: that a decode step reads.
        encoder_parameters: each of which is multiplied once for every patch.
        pictures: the most in a step that the user wants; None: any number.
    """
    kept = min(max(LEAST_KEPT, KEPT_BYTES[device] // (config.hidden_size * itemsize)), MOST_KEPT)
    patches = BALANCE[device] * decoder_bytes // (2 * encoder_parameters)
    alone = PATCHES_ALONE[device]
    return PictureRoom(kept, max(1, min(patches, alone)), alone, pictures)


def kept_bytes(room: PictureRoom, config: VisionModelConfig, itemsize: int) -> int:
    """Bytes of all kept embeddings."""
    return room.tokens * config.hidden_size * itemsize


def parameters(encoder: VisionEncoder) -> int:
    """Numbers that an encoder consists of."""
    return sum(math.prod(shape) for shape in encoder.shapes().values())

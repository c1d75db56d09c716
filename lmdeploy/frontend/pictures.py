"""Pictures: what the frontend asks of lmdeploy.vl for one model; nothing of it is imported for a model of texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmdeploy.config.vision import VisionModelConfig, vision_model
from lmdeploy.engine.request import ImageSpan
from lmdeploy.executor.base import Capacity


class Pictures:
    """Takes pictures out of prompts and puts their tokens in.

    Args:
        config: of the model's pictures.
        tokenizer: the model's.
        vocab_size: of the model.
        load: makes a picture of Pillow's of what a prompt gives.
    """

    def __init__(self, config: VisionModelConfig, tokenizer: Any, vocab_size: int, load: Callable[[Any], Any]) -> None:
        from lmdeploy.vl.processor import build_processor
        from lmdeploy.vl.prompt import Assembler

        self.config = config
        self._assembler = Assembler(config, build_processor(config), tokenizer, load, vocab_size)

    def mark(self, prompt: str | list[Any], images: Sequence[Any]) -> Any:
        """The conversation (or one message of a text and ``images``) with marks in the places of its pictures.

        Raises:
            RequestError: see :func:`lmdeploy.vl.prompt.mark_pictures`.
        """
        from lmdeploy.vl.prompt import mark_pictures, with_pictures

        return mark_pictures([with_pictures(prompt, images)] if isinstance(prompt, str) else prompt, self.config)

    def assemble(self, segments: Sequence[tuple[str, bool]], marked: Any,
                 add_bos: bool) -> tuple[list[int], tuple[ImageSpan, ...]]:
        """Tokens of what was rendered of ``marked``, and the spans of its pictures.

        Raises:
            RequestError: what is wrong with a picture.
        """
        tokens, placed = self._assembler.assemble(segments, marked.mark, marked.pictures, add_bos=add_bos)
        return tokens, tuple(ImageSpan(one.start, one.end, one.digest, one.layout, one.pixels) for one in placed)


def pictures_of(path: Path, tokenizer: Any, capacity: Capacity, load: Callable[[Any], Any] | None = None
                ) -> Pictures | None:
    """Those of the model at ``path``; None if its engine reads text only.

    Args:
        load: None: whatever :func:`lmdeploy.vl.load_image` takes, files of this machine among it.
    """
    config = vision_model(path) if capacity.pictures is not None else None
    if config is None:
        return None
    if load is None:
        from lmdeploy.vl.load import load_image

        load = load_image
    return Pictures(config, tokenizer, capacity.vocab_size, load)

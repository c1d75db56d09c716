"""A vision model without an engine: prompts with pictures, run by a Driver, and what transformers is given for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmdeploy.config.model import ModelConfig
from lmdeploy.config.vision import VisionModelConfig, vision_model
from lmdeploy.models.registry import CausalLM, build_model
from lmdeploy.models.vision.encoder import VisionEncoder, build_encoder
from lmdeploy.nn.build import Build
from lmdeploy.quant.policy import QuantPolicy
from lmdeploy.runner.batch import ImageEmbeds
from lmdeploy.vl.mrope import GridSpan, mrope_positions
from lmdeploy.vl.processor import Processed, build_processor, normalised
from lmdeploy.weights.checkpoint import open_checkpoint
from tests.models.driver import Driver, Row
from tests.models.tiny_vision import IMAGE_TOKEN


@dataclass
class Prompt:
    """Token ids with placeholders, and the pictures that they stand for."""

    ids: list[int]
    spans: list[tuple[int, Processed]]
    embeds: Tensor | None = None  # [len(ids), hidden], of which the spans count
    positions: np.ndarray | None = None  # [3, len(ids)]
    delta: int = 0


@dataclass
class VisionDriver:
    """Model and encoder of a folder; every tensor of the checkpoint must be used."""

    folder: Path
    dtype: torch.dtype = torch.float32
    config: VisionModelConfig = field(init=False)
    model: CausalLM = field(init=False)
    encoder: VisionEncoder = field(init=False)

    def __post_init__(self) -> None:
        found = vision_model(self.folder)
        assert found is not None
        self.config = found
        with open_checkpoint(self.folder) as checkpoint:
            config = ModelConfig.from_dict(checkpoint.config)
            self.model = build_model(config, Build(self.dtype))
            self.encoder = build_encoder(self.config, Build(self.dtype, policy=QuantPolicy(config.quantization)))
            self.model.load(checkpoint.prefix())
            self.encoder.load(checkpoint.prefix())
            checkpoint.finish(self.model.ignore + self.encoder.ignore)
        self.driver = Driver(self.model, dtype=self.dtype)
        self.processor = build_processor(self.config)

    def prompt(self, *parts: Sequence[int] | Image.Image) -> Prompt:
        """Token ids and pictures in their order."""
        prompt = Prompt([], [])
        for part in parts:
            if isinstance(part, Image.Image):
                done = self.processor.process(part)
                prompt.spans.append((len(prompt.ids), done))
                prompt.ids += [IMAGE_TOKEN] * done.layout.tokens
            else:
                prompt.ids += part
        if self.config.mrope:
            grids = [GridSpan(at, *done.layout.grid) for at, done in prompt.spans]
            prompt.positions, prompt.delta = mrope_positions(len(prompt.ids), grids)
        return prompt

    def encode(self, prompts: Sequence[Prompt]) -> None:
        """Embeddings of all pictures of all prompts, in one forward."""
        pictures = [(prompt, at, done) for prompt in prompts for at, done in prompt.spans]
        if not pictures:
            return
        features = self.encoder([torch.from_numpy(done.pixels) for _, _, done in pictures])
        for (prompt, at, done), part in zip(pictures, features):
            embeds = self.encoder.join(part, done.layout)
            assert embeds.shape == (done.layout.tokens, self.config.hidden_size)
            if prompt.embeds is None:
                prompt.embeds = torch.zeros(len(prompt.ids), self.config.hidden_size, dtype=self.dtype)
            prompt.embeds[at : at + done.layout.tokens] = embeds

    def step(self, work: Sequence[tuple[Row, Prompt, Sequence[int]]]) -> list[Tensor]:
        """Feed each row its next tokens, of its prompt or an answer; ``[n, vocab]`` logits of each."""
        dones = [row.done for row, _, _ in work]
        batch = self.driver.batch([(row, ids) for row, _, ids in work])
        rows, values, positions, start = [], [], [], 0
        for (_, prompt, ids), done in zip(work, dones):
            for at, picture in prompt.spans:
                for i in range(max(at, done), min(at + picture.layout.tokens, done + len(ids))):
                    assert prompt.embeds is not None
                    rows.append(start + i - done)
                    values.append(prompt.embeds[i])
            if prompt.positions is not None:
                later = np.arange(done, done + len(ids))[None].repeat(3, 0) + prompt.delta
                known = prompt.positions[:, done : done + len(ids)]
                positions.append(np.concatenate([known, later[:, known.shape[1] :]], 1))
            start += len(ids)
        if rows:
            batch.embeds = ImageEmbeds(torch.tensor(rows), torch.stack(values))
        if positions:
            batch.positions = torch.from_numpy(np.concatenate(positions, 1)).int()
        logits = self.model.logits(self.model(batch, self.driver.kv))
        return list(logits.split([len(ids) for _, _, ids in work]))


def reference_inputs(vision: VisionDriver, prompt: Prompt) -> dict[str, Any]:
    """What transformers' model takes for a prompt."""
    ids = torch.tensor([prompt.ids])
    inputs: dict[str, Any] = {'input_ids': ids, 'attention_mask': torch.ones_like(ids)}
    if not prompt.spans:
        return inputs
    floats = [normalised(done.pixels, vision.config.picture) for _, done in prompt.spans]
    layouts = [done.layout for _, done in prompt.spans]
    if vision.config.picture.tiling == 'native':
        tower = vision.config.tower
        patches = [_patchified(picture[0], tower.patch_size, tower.merge) for picture in floats]
        inputs['pixel_values'] = torch.cat(patches)
        grids = [[1, *(side * tower.merge for side in layout.grid)] for layout in layouts]
        inputs['image_grid_thw'] = torch.tensor(grids)
        inputs['mm_token_type_ids'] = (ids == IMAGE_TOKEN).int()
        return inputs
    if vision.config.picture.tiling == 'anyres':
        most = max(map(len, floats))
        padded = [np.concatenate([part, np.zeros((most - len(part), *part.shape[1:]), np.float32)]) for part in floats]
        inputs['pixel_values'] = torch.from_numpy(np.stack(padded))
        inputs['image_sizes'] = torch.tensor([layout.size[::-1] for layout in layouts])
        return inputs
    inputs['pixel_values'] = torch.from_numpy(np.concatenate(floats))
    return inputs


def _patchified(picture: np.ndarray, side: int, merge: int) -> Tensor:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    patches = Qwen2VLImageProcessorPil().patchify(picture, side, merge, 2)[0]
    return torch.from_numpy(np.ascontiguousarray(patches))

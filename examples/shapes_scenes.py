"""Synthetic scenes with questions and answers: coloured shapes or a digit on a plain ground.

Everything follows from a seed. ``draw`` makes scenes, ``render`` their pictures on any device, ``questions`` what may
be asked of one. ``python examples/shapes_scenes.py [OUT] [COUNT] [SEED]`` writes some as PNG files.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, CELLS = 112, 4  # pixels; cells of the dense labels per side
COLOURS = {'red': (220, 40, 40), 'green': (40, 160, 60), 'blue': (40, 80, 220), 'yellow': (242, 212, 40),
           'orange': (245, 140, 30), 'purple': (140, 60, 180), 'pink': (250, 150, 190),
           'black': (20, 20, 20)}  # fmt: skip
SHAPES = ('circle', 'square', 'triangle', 'star', 'diamond', 'cross', 'heart')
KINDS = SHAPES + tuple('0123456789')
NAMES = tuple(COLOURS)
NUMBERS = ('zero', 'one', 'two', 'three', 'four')
PLACES = ('top left', 'top', 'top right', 'left', 'center', 'right', 'bottom left', 'bottom', 'bottom right')
# digits of 3 by 5 cells, row by row
FONT = ('111101101101111', '010110010010111', '111001111100111', '111001111001111', '101101111001001',
        '111100111001111', '111100111101111', '111001001010010', '111101111101111', '111101111001111')  # fmt: skip
CAPTION = ('What is in this image?', 'Describe this image.', 'describe this image', 'What do you see?',
           'What is in the picture?', 'What does the image show?')  # fmt: skip


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: its kind and colour by number, its place by number (rows of three, from the top left)."""

    kind: int
    colour: int
    place: int

    def __str__(self) -> str:
        name = f'{NAMES[self.colour]} {KINDS[self.kind]}'
        if self.kind >= len(SHAPES):
            name = f'{NAMES[self.colour]} digit {KINDS[self.kind]}'
        return f'{"an" if name[0] in "aeiou" else "a"} {name}'


@dataclass(slots=True)
class Scenes:
    """Scenes, up to four things each; arrays of ``[n, 4]``, ``kind = -1`` where there is no thing.

    Attributes:
        x, y, size: centre and half width, of a picture of side 1.
        stretch: width by height. turn: radians.
        shade: ``[n, 4, 3]``, and ground ``[n, 3]``: colours from 0 to 255. noise: ``[n]``, a deviation.
    """

    kind: np.ndarray
    colour: np.ndarray
    place: np.ndarray
    x: np.ndarray
    y: np.ndarray
    size: np.ndarray
    stretch: np.ndarray
    turn: np.ndarray
    shade: np.ndarray
    ground: np.ndarray
    noise: np.ndarray

    def things(self, i: int) -> list[Thing]:
        """The things of scene ``i`` in reading order."""
        every = zip(self.kind[i].tolist(), self.colour[i].tolist(), self.place[i].tolist())
        found = [Thing(*numbers) for numbers in every if numbers[0] >= 0]
        return sorted(found, key=lambda thing: thing.place)


def draw(seed: int, count: int) -> Scenes:
    """``count`` scenes: one thing in half of them, a digit in some; several things lie in places of their own."""
    rng = np.random.default_rng(seed)
    number = rng.choice([1, 2, 3, 4], count, p=[0.55, 0.22, 0.13, 0.10])
    digit = rng.random(count) < 0.12
    number[digit] = 1
    kind = rng.integers(0, len(SHAPES), (count, 4))
    kind[digit] = rng.integers(len(SHAPES), len(KINDS), (digit.sum(), 4))
    kind[np.arange(4)[None] >= number[:, None]] = -1
    place = rng.permuted(np.tile(np.arange(9), (count, 1)), axis=1)[:, :4]
    alone = number == 1
    size = rng.uniform(0.12, 0.16, (count, 4))
    size[alone] = rng.uniform(0.15, 0.42, (alone.sum(), 4))
    roam = np.clip(0.14 - (size - 0.10) / 3, 0.0, 0.03) * rng.uniform(-1, 1, (2, count, 4))
    x = (place % 3 + 0.5) / 3 + roam[0]
    y = (place // 3 + 0.5) / 3 + roam[1]
    x, y = np.clip(x, size + 0.02, 0.98 - size), np.clip(y, size + 0.02, 0.98 - size)
    place = np.minimum((y * 3).astype(int), 2) * 3 + np.minimum((x * 3).astype(int), 2)
    light = rng.random(count)
    ground = np.where(light[:, None] < 0.55, rng.uniform(244, 255, (count, 1)), rng.uniform(195, 250, (count, 3)))
    dark = light > 0.87
    ground[dark] = rng.uniform(40, 90, (dark.sum(), 1))
    colour = rng.integers(0, len(NAMES), (count, 4))
    black = NAMES.index('black')
    colour[dark] = np.where(colour[dark] == black, 0, colour[dark])
    shade = np.clip(np.array(list(COLOURS.values()))[colour] + rng.uniform(-18, 18, (count, 4, 3)), 0, 255)
    shade[colour == black] = rng.uniform(0, 30, ((colour == black).sum(), 1))
    return Scenes(kind, colour, place, x, y, size, np.exp(rng.uniform(-0.18, 0.18, (count, 4))),
                  rng.uniform(-0.2, 0.2, (count, 4)), shade, ground,
                  rng.uniform(0, 5, count) * (rng.random(count) < 0.4))


def render(scenes: Scenes, device: torch.device | str = 'cpu') -> tuple[Tensor, Tensor]:
    """Pictures ``[n, 3, SIDE, SIDE] uint8``; which thing fills most of each cell, ``[n, CELLS, CELLS]`` (-1: none)."""
    def on(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, torch.float32)

    count = len(scenes.kind)
    axis = (torch.arange(SIDE, device=device) + 0.5) / SIDE
    row, slot = np.nonzero(scenes.kind >= 0)
    kinds = scenes.kind[row, slot]
    order = np.argsort(kinds, kind='stable')  # things of one kind are drawn together
    row, slot, kinds = row[order], slot[order], kinds[order]
    x, y, size, stretch, turn = (on(values[row, slot])[:, None, None] for values in (
        scenes.x, scenes.y, scenes.size, scenes.stretch, scenes.turn))
    dx, dy = axis[None, None, :] - x, axis[None, :, None] - y
    u = (dx * turn.cos() + dy * turn.sin()) / (size * stretch.sqrt())
    v = (dy * turn.cos() - dx * turn.sin()) / (size / stretch.sqrt())
    found, starts = np.unique(kinds, return_index=True)
    ends = [*starts[1:].tolist(), len(kinds)]
    inside = torch.cat([-distance(int(kind), u[start:end], v[start:end])
                        for kind, start, end in zip(found, starts.tolist(), ends)])
    cover = (inside * size * SIDE + 0.5).clamp(0, 1)
    shade = on(scenes.shade[row, slot])[:, :, None, None]
    picture = on(scenes.ground)[:, :, None, None].expand(-1, -1, SIDE, SIDE).clone()
    filled = torch.zeros(count, 4, CELLS, CELLS, device=device)
    row, slot = (torch.from_numpy(numbers).to(device) for numbers in (row, slot))
    filled[row, slot] = F.avg_pool2d(cover, SIDE // CELLS)
    for layer in range(4):
        mine = (slot == layer).nonzero()[:, 0]
        part = cover[mine][:, None]
        picture[row[mine]] = picture[row[mine]] * (1 - part) + shade[mine] * part
    generator = torch.Generator(device).manual_seed(int(scenes.kind.sum()) + count)
    noise = torch.randn(picture.shape, device=device, generator=generator) * on(scenes.noise)[:, None, None, None]
    most, which = filled.max(1)
    return (picture + noise + 0.5).clamp(0, 255).to(torch.uint8), torch.where(most > 0.15, which, -1)


def distance(kind: int, u: Tensor, v: Tensor) -> Tensor:
    """About how far a point is outside of a thing of half width 1 (negative: inside); v points down."""
    a, b = u.abs(), v.abs()
    if kind >= len(SHAPES):
        return _digit(kind - len(SHAPES), u, v)
    name = SHAPES[kind]
    if name == 'circle':
        return (u * u + v * v).sqrt() - 0.92
    if name == 'square':
        return torch.maximum(a, b) - 0.82
    if name == 'triangle':
        return torch.maximum((1.7 * a - 0.9 * (v + 0.9)) / math.hypot(1.7, 0.9), v - 0.8)
    if name == 'diamond':
        return (a / 0.75 + b / 0.98 - 1) * 0.6
    if name == 'cross':
        return torch.minimum(torch.maximum(a - 0.3, b - 0.92), torch.maximum(a - 0.92, b - 0.3))
    if name == 'heart':
        p, q = u * 1.25, 0.15 - v * 1.2
        return (p * p + q * q - 1 - p.abs() ** (2 / 3) * q) * 0.4
    fifth = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(u, -v) + fifth / 2, fifth) - fifth / 2  # 0 at a tip
    radius = (u * u + v * v).sqrt()
    px, py = radius * angle.cos(), radius * angle.abs().sin()
    inner = 0.42 * math.cos(fifth / 2), 0.42 * math.sin(fifth / 2)
    edge = inner[0] - 0.98, inner[1]  # from the tip to the inner corner
    return ((px - 0.98) * edge[1] - py * edge[0]) / math.hypot(*edge)


def _digit(value: int, u: Tensor, v: Tensor) -> Tensor:
    """A digit of 3 by 5 strokes, with round corners."""
    cells = torch.tensor([int(bit) for bit in FONT[value]], dtype=torch.float32, device=u.device).view(1, 1, 5, 3)
    grid = torch.stack((u / 0.62, v / 0.95), -1)
    large = F.interpolate(F.pad(cells, (1, 1, 1, 1)), scale_factor=6)
    large = F.avg_pool2d(large, 5, 1, 2).expand(len(u), -1, -1, -1)
    inside = F.grid_sample(large, grid * torch.tensor([3 / 5, 5 / 7], device=u.device),
                                             align_corners=False)[:, 0]  # fmt: skip
    return (0.5 - inside) * 0.35


def questions(things: list[Thing], rng: np.random.Generator) -> list[tuple[str, str]]:
    """What may be asked of a scene, a caption first; in words that depend on ``rng``."""
    def pick(*words: str) -> str:
        return words[rng.integers(len(words))]

    names = [str(thing) for thing in things]
    listed = names[0] if len(names) == 1 else ', '.join(names[:-1]) + ' and ' + names[-1]
    found = [(pick(*CAPTION), f'{listed[0].upper()}{listed[1:]}.')]
    kinds = [thing.kind for thing in things]
    if kinds[0] >= len(SHAPES):
        thing = things[0]
        found += [(pick('Which digit is shown?', 'What number is this?', 'What digit is it?'),
                   f'It is a {KINDS[thing.kind]}.'),
                  (pick('What color is the digit?', 'What color is it?'), f'It is {NAMES[thing.colour]}.')]
    else:
        for thing in things:
            shape, colour = KINDS[thing.kind], NAMES[thing.colour]
            alone = len(things) == 1
            if kinds.count(thing.kind) == 1:
                ask = f'What color is the {shape}?'
                ask = pick(ask, f'Which color is the {shape}?', f'What color does the {shape} have?',
                           'What color is it?' if alone else ask)
                found.append((ask, f'It is {colour}.'))
            if [other.colour for other in things].count(thing.colour) == 1:
                ask = f'What shape is the {colour} object?'
                if alone:
                    ask = pick(ask, 'What shape is it?', 'Which shape is this?', 'What shape is in the image?')
                found.append((ask, f'It is a {shape}.'))
            if sum(other.kind == thing.kind and other.colour == thing.colour for other in things) == 1:
                found.append((f'Where is the {colour} {shape}?', f'At the {PLACES[thing.place]}.'))
        number = NUMBERS[len(things)]
        found.append((pick('How many shapes are there?', 'How many objects are in the image?'),
                      f'There {"is" if len(things) == 1 else "are"} {number}.'))
        other = Thing(int(rng.integers(len(SHAPES))), int(rng.integers(len(NAMES))), 0)
        asked = things[rng.integers(len(things))] if rng.random() < 0.5 else other
        there = any(t.kind == asked.kind and t.colour == asked.colour for t in things)
        found.append((f'Is there {asked}?', 'Yes.' if there else 'No.'))
    return found


def main(out: str = 'scenes', count: str = '8', seed: str = '7') -> None:
    """Write scenes as PNG files, and what can be asked of them as one JSON file."""
    from PIL import Image

    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    scenes = draw(int(seed), int(count))
    pictures, _ = render(scenes)
    rng, asked = np.random.default_rng(int(seed)), {}
    for i, picture in enumerate(pictures):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f'{i}.png')
        asked[f'{i}.png'] = questions(scenes.things(i), rng)
    (folder / 'questions.json').write_text(json.dumps(asked, indent=1))
    print(f'{len(asked)} pictures and their questions in {folder}')


if __name__ == '__main__':
    main(*sys.argv[1:])

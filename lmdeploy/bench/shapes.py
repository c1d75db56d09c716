"""Shapes of well-known models: their config.json without weights, for runs with random ones.

``shapes:llama3-8b`` stands wherever a benchmark takes a model.
"""

from __future__ import annotations

from pathlib import Path

from lmdeploy.errors import SourceError

FOLDER = Path(__file__).parent / 'configs'
PREFIX = 'shapes:'


def names() -> list[str]:
    """The names after the prefix."""
    return sorted(path.stem for path in FOLDER.glob('*.json'))


def find(model: str) -> Path | None:
    """The config that ``shapes:NAME`` stands for; None: ``model`` is not of that form.

    Raises:
        SourceError: LMD-590: there are no shapes of that name.
    """
    if not model.startswith(PREFIX):
        return None
    name = model.removeprefix(PREFIX)
    if name not in names():
        raise SourceError('LMD-590', name=name, known=', '.join(PREFIX + known for known in names()))
    return FOLDER / f'{name}.json'


def config_alone(model: str) -> Path | None:
    """The folder or the file that ``model`` names, if it is there and holds a config; weights are not asked for."""
    path = Path(model).expanduser()
    if (path / 'config.json').is_file() or path.suffix == '.json' and path.is_file():
        return path
    return None

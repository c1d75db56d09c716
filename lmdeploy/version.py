"""The version of the package, in one place (hatchling reads it from here)."""

__version__ = '0.1.0'


def parse_version_info(text: str) -> tuple[int | str, ...]:
    """Split ``'0.1.0rc1'`` into ``(0, 1, '0rc1')``: integers where a part is one, text elsewhere."""
    return tuple(int(part) if part.isdigit() else part for part in text.split('.'))


version_info = parse_version_info(__version__)

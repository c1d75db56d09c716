"""Error texts: model."""

TEXTS: dict[str, dict[str, str]] = {}

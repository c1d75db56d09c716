"""Error texts: weights."""

TEXTS: dict[str, dict[str, str]] = {}

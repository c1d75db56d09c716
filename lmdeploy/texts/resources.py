"""Error texts: resources."""

TEXTS: dict[str, dict[str, str]] = {}

"""Error texts: engine."""

TEXTS: dict[str, dict[str, str]] = {}

"""Error texts: cli."""

TEXTS: dict[str, dict[str, str]] = {}

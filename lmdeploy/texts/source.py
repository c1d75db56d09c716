"""Error texts: source."""

TEXTS: dict[str, dict[str, str]] = {}

"""Error texts: chat."""

TEXTS: dict[str, dict[str, str]] = {}

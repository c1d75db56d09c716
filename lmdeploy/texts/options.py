"""Error texts: options."""

TEXTS: dict[str, dict[str, str]] = {}

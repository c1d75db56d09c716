"""Error texts: requests."""

TEXTS: dict[str, dict[str, str]] = {}

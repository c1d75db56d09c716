"""Error texts: tokenizer."""

TEXTS: dict[str, dict[str, str]] = {}

"""Anthropic's Messages API over the same engine: bodies, conversion, events, handlers."""

"""The text that marks the place of a picture in a prompt."""

from __future__ import annotations

IMAGE_TOKEN = '<IMAGE_TOKEN>'

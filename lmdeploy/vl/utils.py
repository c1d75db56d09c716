"""Public path of what loads and encodes pictures -> lmdeploy.vl.load."""

from __future__ import annotations

from lmdeploy.vl.load import encode_image_base64, load_image

__all__ = ['encode_image_base64', 'load_image']

"""The chat page at ``/``: a few static files, read once, that go out with a policy under which nothing else can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / 'ui'
TYPES = {'.html': 'text/html; charset=utf-8', '.css': 'text/css; charset=utf-8',
         '.js': 'text/javascript; charset=utf-8', '.svg': 'image/svg+xml'}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
          "trusted-types 'none'")
"""Scripts and styles come from this server's files only, never from within the page; a text cannot become HTML; nothing
is fetched from or sent to another machine; no other page can frame this one."""
HEADERS = {
    'content-security-policy': POLICY,
    'referrer-policy': 'no-referrer',
    'cross-origin-opener-policy': 'same-origin',
    'permissions-policy': 'camera=(), geolocation=(), microphone=()',
    'cache-control': 'no-cache',  # after an update of the package, the page is the new one
    'x-content-type-options': 'nosniff',
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One file of the page: where it is served, and what is sent."""

    path: str
    type: str
    body: bytes


def page_files() -> list[PageFile]:
    """All files of the page; ``index.html`` is ``/``, the others are below ``/ui/``."""
    return [PageFile('/' if path.name == 'index.html' else f'/ui/{path.name}', TYPES[path.suffix], path.read_bytes())
            for path in sorted(FOLDER.iterdir()) if path.suffix in TYPES]

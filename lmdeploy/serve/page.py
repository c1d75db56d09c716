"""The chat page at ``/``: a few static files, read once, that go out with a policy under which nothing else can run.

The page is open, so that it can ask its reader for the key; what it calls is not.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import Response

from lmdeploy.serve.errors import HttpError

FOLDER = Path(__file__).parent / 'ui'
TYPES = {'.html': 'text/html', '.css': 'text/css', '.js': 'text/javascript', '.svg': 'image/svg+xml'}
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
}


class Page:
    """The handlers. ``index.html`` names the other files, which are below ``/ui/``."""

    def __init__(self) -> None:
        self._files = {path.name: (path.read_bytes(), TYPES[path.suffix]) for path in FOLDER.iterdir()
                       if path.suffix in TYPES}

    async def index(self) -> Response:
        """The page."""
        return await self.part('index.html')

    async def part(self, name: str) -> Response:
        """One of its files. Raises: HttpError LMD-506, it has no such file."""
        if name not in self._files:
            raise HttpError('LMD-506')
        body, kind = self._files[name]
        return Response(body, headers=HEADERS, media_type=kind)

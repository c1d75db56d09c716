"""Routes: exact paths, each with its methods, its access and its handler. What is not in the table does not exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from lmdeploy.serve.auth import Access
from lmdeploy.serve.errors import HttpError
from lmdeploy.serve.http import Handler


@dataclass(frozen=True, slots=True)
class Route:
    """One operation.

    Attributes:
        handler: answers a request whose body, if any, was read.
        access: who may call it; there is no default.
        body: what a JSON body must look like, for the documentation.
        answer: what the response is, for the documentation.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    body: type[BaseModel] | None = None
    answer: Any = None


class Router:
    """Looks routes up by their exact path."""

    def __init__(self, routes: Iterable[Route]) -> None:
        self.routes: dict[str, dict[str, Route]] = {}
        for route in routes:
            methods = self.routes.setdefault(route.path, {})
            assert route.method not in methods, f'two routes for {route.method} {route.path}'
            assert isinstance(route.access, Access)
            methods[route.method] = route

    def __iter__(self):
        return (route for methods in self.routes.values() for route in methods.values())

    def find(self, method: str, path: str) -> Route:
        """The route of a request.

        Raises:
            HttpError: LMD-506 no such path, LMD-507 not with this method.
        """
        methods = self.routes.get(path)
        if methods is None:
            raise HttpError('LMD-506')
        route = methods.get('GET' if method == 'HEAD' else method)
        if route is None:
            raise HttpError('LMD-507', method=method[:16], allowed=', '.join(sorted(methods)))
        return route

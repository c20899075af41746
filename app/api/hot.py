"""The routes that callers use thousands of times a second, answered before the framework.

FastAPI's routing, middleware and responses cost ten times as much as applying an adapter to one
vector does. So these paths are matched here, and answered by functions that take a `Call`; their
operations are declared to FastAPI all the same, for the OpenAPI document and for refusing other
methods (docs/decisions/0011-hot-routes.md). `bonsai-lora serve` does not even go through ASGI for
them: `app/api/direct.py`.
"""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.call import AsgiCall, Call
from app.api.deps import Context
from app.api.errors import problem_response
from app.api.middleware import Observer
from app.api.request_head import RequestHead, read_head
from app.errors import BonsaiLoraError

Handler = Callable[..., Awaitable[None]]
"""Called with the context, the call, and the variable parts of the path."""

_HEADS = 512
"""Heads that are remembered: a client's requests of one shape have one."""


class HotRoute:
    """A path template such as `/v1/sets/{set}/apply`, and who answers a POST to it."""

    def __init__(self, path: str, handler: Handler) -> None:
        pieces = path.split("/")
        self.length = len(pieces)
        self.last = pieces[-1]
        self.fixed = [
            (place, piece) for place, piece in enumerate(pieces) if not piece.startswith("{")
        ]
        self.variable = [place for place, piece in enumerate(pieces) if piece.startswith("{")]
        self.handler = handler
        self.about = SimpleNamespace(path=path)
        """What metrics call the route, where the framework puts its own."""


class Found(NamedTuple):
    """A hot route, and the variable parts of a path that it has."""

    route: HotRoute
    names: Sequence[str]


class HotRoutes:
    """An ASGI application: answers POST to its routes and passes on everything else."""

    def __init__(
        self, app: ASGIApp, context: Context, routes: Sequence[HotRoute], observer: Observer
    ) -> None:
        self._app = app
        self._context = context
        self.stall_seconds = context.settings.stall_seconds
        self._routes = {(route.length, route.last): route for route in routes}
        assert len(self._routes) == len(routes), "two routes that look alike"
        self.observer = observer
        self.find_head = lru_cache(_HEADS)(self._find_head)
        """Gives the head that bytes are, and its hot route; None where there is none."""

    def find(self, path: str) -> Found | None:
        """Return the route of a POST to `path`."""
        pieces = path.split("/")
        route = self._routes.get((len(pieces), pieces[-1]))
        if route is None or any(pieces[place] != piece for place, piece in route.fixed):
            return None
        return Found(route, [pieces[place] for place in route.variable])

    def _find_head(self, raw: bytes) -> tuple[RequestHead, Found] | None:
        head = read_head(raw)
        found = None if head is None else self.find(head.path)
        return None if head is None or found is None else (head, found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        found = None
        if scope["type"] == "http" and scope["method"] == "POST":
            found = self.find(scope["path"])
        if found is None:
            await self._app(scope, receive, send)
            return
        refusal = await self.answer(found, AsgiCall(scope, receive, send), scope)
        if refusal is not None:
            await refusal(scope, receive, send)

    async def answer(
        self, found: Found, call: Call, scope: MutableMapping[str, Any]
    ) -> Response | None:
        """Let the route answer `call`; return what is to be answered where it refuses."""
        scope["route"] = found.route.about
        try:
            await found.route.handler(self._context, call, *found.names)
        except BonsaiLoraError as error:
            return problem_response(error, scope)
        return None

"""The routes that callers use thousands of times a second, answered before the framework.

FastAPI's routing, middleware and responses cost ten times as much as applying an adapter to one
vector does. So these paths are matched here and answered in plain ASGI; their operations are
declared to FastAPI all the same, for the OpenAPI document and for refusing other methods
(docs/decisions/0011-hot-routes.md).
"""

from collections.abc import Awaitable, Callable
from types import SimpleNamespace

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.call import Call
from app.api.deps import Context
from app.api.errors import problem_response
from app.errors import BonsaiLoraError

Handler = Callable[..., Awaitable[None]]
"""Called with the context, the call, and the variable parts of the path."""


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


class HotRoutes:
    """An ASGI application: answers POST to its routes and passes on everything else."""

    def __init__(self, app: ASGIApp, context: Context, routes: list[HotRoute]) -> None:
        self._app = app
        self._context = context
        self._routes = {(route.length, route.last): route for route in routes}
        assert len(self._routes) == len(routes), "two routes that look alike"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        pieces = scope["path"].split("/")
        route = self._routes.get((len(pieces), pieces[-1]))
        if route is None or any(pieces[place] != piece for place, piece in route.fixed):
            await self._app(scope, receive, send)
            return
        scope["route"] = route.about
        try:
            call = Call(scope, receive, send)
            await route.handler(self._context, call, *[pieces[place] for place in route.variable])
        except BonsaiLoraError as error:
            await problem_response(error, scope)(scope, receive, send)

"""The routes that the fast lane serves, and how a path is matched to one."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute

from bonsai_lora.api.auth import PRIVATE, Authenticator
from bonsai_lora.api.call import BufferResponse, HeaderLines, get_call
from bonsai_lora.api.context import Context
from bonsai_lora.api.middleware import Observer
from bonsai_lora.api.scopes import scope_of
from bonsai_lora.fast_lane.head import RequestHead, read_head

_READ_BYTES = 1 << 18
"""Largest single read."""
_BATCH_ANSWERS = 64
"""Most responses in one batch, which bounds the memory they hold."""
_CACHED_HEADS = 1024
"""Parsed heads to cache: requests with the same shape from one client have the same head. A decode
step of a model of 36 layers has 144 different ones."""
_CACHED_HEAD_BYTES = 1 << 10
"""Longest head to cache, which bounds the memory of the cache."""


class LaneRoute:
    """A path template such as `/v1/sets/{set}/apply` and the function that handles a POST to it.

    The function is called with the call and the path parameters, in the order of the path.
    """

    def __init__(self, path: str, endpoint: Callable[..., Awaitable[BufferResponse]]) -> None:
        pieces = path.split("/")
        self.length = len(pieces)
        self.last = pieces[-1]
        self.fixed = [
            (place, piece) for place, piece in enumerate(pieces) if not piece.startswith("{")
        ]
        self.variable = {
            piece[1:-1]: place for place, piece in enumerate(pieces) if piece.startswith("{")
        }
        self.endpoint = endpoint
        self.need = scope_of("POST", path)
        """The scope that the caller's key must have."""
        self.scope_route = SimpleNamespace(path=path)
        """Stands in for the framework's route in the scope; metrics read its `path`."""


class RouteMatch(NamedTuple):
    """A matched route and the values of its path parameters by name, in the order of the path."""

    route: LaneRoute
    path_params: Mapping[str, str]


class WriteBatch:
    """Short responses, written together after all requests that arrived together are computed.

    The first write wakes a sleeping client, which costs the sender an interrupt (an expensive one
    in a virtual machine). Writes that follow directly find the client awake: 1.4 times as many
    one-row requests per second over eight connections (docs/decisions/0011-hot-routes.md).
    """

    def __init__(self) -> None:
        self._answers: list[tuple[asyncio.Transport, bytes]] = []

    def add(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, answer: bytes
    ) -> None:
        """Schedule `answer` to be written before the event loop polls its sockets again."""
        if not self._answers:
            loop.call_soon(self.flush)
        self._answers.append((transport, answer))
        if len(self._answers) == _BATCH_ANSWERS:
            self.flush()

    def flush(self) -> None:
        """Write the batch now."""
        answers, self._answers = self._answers, []
        for transport, answer in answers:
            if not transport.is_closing():
                transport.write(answer)


class FastLane:
    """State shared by all connections of an application."""

    def __init__(self, app: FastAPI) -> None:
        routes = list(lane_routes(app))
        self._routes = {(route.length, route.last): route for route in routes}
        assert len(self._routes) == len(routes), "ambiguous routes"
        self.batch = WriteBatch()
        self.context: Context = app.state.context
        self.authenticator: Authenticator = app.state.authenticator
        self.more_headers: HeaderLines = (
            [(b"cache-control", PRIVATE.encode())] if self.authenticator.has_keys else []
        )
        self.observer: Observer = app.state.observer
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        """Shared by all connections: each copies its bytes before the next one reads."""
        self._cached_head = lru_cache(_CACHED_HEADS)(self._parse_head)

    def match(self, path: str) -> RouteMatch | None:
        """Return the match for a POST to `path`, or None."""
        pieces = path.split("/")
        route = self._routes.get((len(pieces), pieces[-1]))
        if route is None or any(pieces[place] != piece for place, piece in route.fixed):
            return None
        found = {name: pieces[place] for name, place in route.variable.items()}
        return RouteMatch(route, found) if all(found.values()) else None

    def match_head(self, raw: bytes) -> tuple[RequestHead, RouteMatch] | None:
        """Return the parsed head and the matched route of head bytes, or None."""
        parse = self._cached_head if len(raw) <= _CACHED_HEAD_BYTES else self._parse_head
        return parse(raw)

    def _parse_head(self, raw: bytes) -> tuple[RequestHead, RouteMatch] | None:
        head = read_head(raw)
        found = None if head is None else self.match(head.path)
        return None if head is None or found is None else (head, found)


def lane_routes(app: FastAPI) -> Iterator[LaneRoute]:
    """Yield the routes of `app` whose functions take a call and path parameters.

    The functions must take the parameters in the order of the path, and nothing else.
    """
    for route in app.state.routes:
        if isinstance(route, APIRoute) and any(
            one.call is get_call for one in route.dependant.dependencies
        ):
            assert route.methods == {"POST"}, "the fast lane serves POST only"
            yield LaneRoute(route.path, route.endpoint)

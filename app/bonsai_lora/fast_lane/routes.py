"""Which routes the fast lane calls, and how it finds one by a path."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

from fastapi import FastAPI
from fastapi.routing import APIRoute

from bonsai_lora.api.call import Answer, get_call
from bonsai_lora.api.context import Context
from bonsai_lora.api.middleware import Observer
from bonsai_lora.fast_lane.head import RequestHead, read_head

_READ_BYTES = 1 << 18
"""Most that is read at once."""
_HEADS = 512
"""Heads that are remembered: a client's requests of one shape have one."""


class LaneRoute:
    """A path template such as `/v1/sets/{set}/apply`, and the function that answers a POST to it.

    That takes the call and the variable parts of the path, in their order.
    """

    def __init__(self, path: str, endpoint: Callable[..., Awaitable[Answer]]) -> None:
        pieces = path.split("/")
        self.length = len(pieces)
        self.last = pieces[-1]
        self.fixed = [
            (place, piece) for place, piece in enumerate(pieces) if not piece.startswith("{")
        ]
        self.variable = [place for place, piece in enumerate(pieces) if piece.startswith("{")]
        self.endpoint = endpoint
        self.about = SimpleNamespace(path=path)
        """What metrics call the route, where the framework puts its own."""


class Found(NamedTuple):
    """A route, and the variable parts of a path that it has."""

    route: LaneRoute
    names: Sequence[str]


class FastLane:
    """What all connections of an application share."""

    def __init__(self, app: FastAPI) -> None:
        routes = list(lane_routes(app))
        self._routes = {(route.length, route.last): route for route in routes}
        assert len(self._routes) == len(routes), "two routes that look alike"
        self.context: Context = app.state.context
        self.observer: Observer = app.state.observer
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        """Of all connections: each takes its bytes out before the next one reads."""
        self.find_head = lru_cache(_HEADS)(self._find_head)
        """Returns the head that bytes are, and its route; None where there is none."""

    def find(self, path: str) -> Found | None:
        """Return the route of a POST to `path`."""
        pieces = path.split("/")
        route = self._routes.get((len(pieces), pieces[-1]))
        if route is None or any(pieces[place] != piece for place, piece in route.fixed):
            return None
        names = [pieces[place] for place in route.variable]
        return Found(route, names) if all(names) else None

    def _find_head(self, raw: bytes) -> tuple[RequestHead, Found] | None:
        head = read_head(raw)
        found = None if head is None else self.find(head.path)
        return None if head is None or found is None else (head, found)


def lane_routes(app: FastAPI) -> Iterator[LaneRoute]:
    """Yield the routes of `app` whose functions take a call and nothing else but path parameters.

    Their functions must name those in the order of the path.
    """
    for route in app.state.routes:
        if isinstance(route, APIRoute) and any(
            one.call is get_call for one in route.dependant.dependencies
        ):
            assert route.methods == {"POST"}, "the fast lane takes a POST"
            yield LaneRoute(route.path, route.endpoint)

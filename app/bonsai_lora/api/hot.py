"""The routes that callers use thousands of times a second, answered before the framework.

FastAPI's routing, middleware and responses cost ten times as much as applying an adapter to one
vector does. So these paths are matched here, and answered by functions that take a `Call`; their
operations are declared to FastAPI all the same, for the OpenAPI document and for refusing other
methods (docs/decisions/0011-hot-routes.md). `bonsai-lora serve` does not even go through ASGI for
them: `app/bonsai_lora/api/direct.py`.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bonsai_lora.api.call import AsgiCall, Call, Counted, Key, Lines
from bonsai_lora.api.deps import Context
from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.middleware import Observer
from bonsai_lora.api.request_head import RequestHead, read_head
from bonsai_lora.core.cast import Floats
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.service.infer import MIXED
from bonsai_lora.service.plans import PLANNED_JSON_BYTES, Plan
from bonsai_lora.storage.counts import Counts
from bonsai_lora.storage.regions import SharedRegions
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.buffers import Buffer
from bonsai_lora.wire.json import take_lists

Handler = Callable[..., Awaitable[None]]
"""Called with the context, the call, and the variable parts of the path."""

FormOf = Callable[[RequestHead, Buffer], bytes | None]
"""Gives the first bytes of a body, which say what the others are; None where they are many."""

_PLANS = 16
"""Plans that are remembered of one version of a set."""
_TOGETHER = 64
"""Answers that leave together at most: they are memory that only the socket bounds."""
_READ_BYTES = 1 << 18
"""Most that is read at once."""
_TRIES = 4
"""How often in a row JSON may be looked into in vain, before that waits for the next plan."""
_HEADS = 512
"""Heads that are remembered: a client's requests of one shape have one."""


class HotRoute:
    """A path template such as `/v1/sets/{set}/apply`, and who answers a POST to it."""

    def __init__(self, path: str, handler: Handler, form_of: FormOf | None = None) -> None:
        pieces = path.split("/")
        self.length = len(pieces)
        self.last = pieces[-1]
        self.fixed = [
            (place, piece) for place, piece in enumerate(pieces) if not piece.startswith("{")
        ]
        self.variable = [place for place, piece in enumerate(pieces) if piece.startswith("{")]
        self.handler = handler
        self.form_of = form_of
        """For routes whose first name is that of a set, and whose requests can be planned."""
        self.about = SimpleNamespace(path=path)
        """What metrics call the route, where the framework puts its own."""


class Found(NamedTuple):
    """A hot route, and the variable parts of a path that it has."""

    route: HotRoute
    names: Sequence[str]


@dataclass(frozen=True, eq=False, slots=True)
class Planned:
    """How to answer requests that have one head and one form."""

    plan: Plan
    lines: Lines
    """The answer's header lines."""
    model: Counted | None
    """What an inference is counted as."""


class Outbox:
    """Short answers that go out when all requests that came together have been computed.

    A client that sleeps is woken by its answer, which costs the sender an interrupt (in a virtual
    machine a long one). Behind the first, others find it awake: 1.3 times as many requests a second
    of one row over eight connections (docs/decisions/0011-hot-routes.md).
    """

    def __init__(self) -> None:
        self._answers: list[tuple[asyncio.Transport, bytes]] = []

    def put(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, answer: bytes
    ) -> None:
        """Write `answer` before the event loop looks at its sockets again."""
        if not self._answers:
            loop.call_soon(self.flush)
        self._answers.append((transport, answer))
        if len(self._answers) == _TOGETHER:
            self.flush()

    def flush(self) -> None:
        """Write them now."""
        answers, self._answers = self._answers, []
        for transport, answer in answers:
            if not transport.is_closing():
                transport.write(answer)


class HotRoutes:
    """An ASGI application: answers POST to its routes and passes on everything else."""

    def __init__(
        self, app: ASGIApp, context: Context, routes: Sequence[HotRoute], observer: Observer
    ) -> None:
        self._app = app
        self._context = context
        self.stall_seconds = context.settings.stall_seconds
        self._most_json_bytes = min(PLANNED_JSON_BYTES, context.limits.max_json_bytes)
        self._routes = {(route.length, route.last): route for route in routes}
        assert len(self._routes) == len(routes), "two routes that look alike"
        self.observer = observer
        self.outbox = Outbox()
        self.read_buffer = memoryview(bytearray(_READ_BYTES))
        """Of all connections: each takes its bytes out before the next one reads."""
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

    @property
    def regions(self) -> SharedRegions:
        """The shared memory that plans read and write."""
        return self._context.inference.regions

    def recall(
        self, head: RequestHead, found: Found, body: Buffer, *, may_take: bool
    ) -> tuple[Planned, Sequence[Floats]] | None:
        """Return how to answer a request, if one like it was answered by the present version.

        `may_take` says whether lists may be taken out of JSON for that; they are returned too.
        """
        if found.route.form_of is None or found.names[0] == MIXED:
            return None
        stored = self._context.store.read(found.names[0])
        form = found.route.form_of(head, body)
        planned: Planned | None = stored.memo.get((head.key, form))
        if planned is not None:
            return (planned, ()) if planned.plan.body_bytes == len(body) else None
        tries = stored.memo.get(head.key, 0)
        if not may_take or not tries or len(body) > self._most_json_bytes:
            return None
        taken = take_lists(body)
        planned = stored.memo.get((head.key, taken.form))
        stored.memo[head.key] = tries - 1 if planned is None else _TRIES
        return None if planned is None else (planned, taken.arrays)

    def remember(self, stored: StoredSet, head: RequestHead, form: Key, planned: Planned) -> None:
        """Remember it with the version of the set that it is for."""
        if len(stored.memo) >= _PLANS:
            stored.memo.clear()
        stored.memo[head.key, form] = planned
        if planned.plan.is_json:
            stored.memo[head.key] = _TRIES

    def count(self, planned: Planned, counts: Counts, seconds: float) -> None:
        """Count a request that was answered as planned."""
        self._context.metrics.rows_applied.inc(counts.vectors)
        if planned.model is not None:
            counts.last_ms = time.time_ns() // 1_000_000
            counts.success_count, counts.success_ns = 1, int(seconds * 1e9)
            self._context.counts.add(*planned.model, counts)

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

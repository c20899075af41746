"""What happens to every request: an id, a count, a log line, and no exception out."""

import asyncio
import itertools
import logging
import re
import secrets
import types
from collections.abc import Awaitable, Generator
from time import perf_counter
from typing import Any, TypeVar, cast

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import fault_response
from app.api.metrics import Metrics
from app.errors import BonsaiLoraError, StalledError

T = TypeVar("T")

SLOW_SECONDS = 1.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_numbers = itertools.count(secrets.randbits(60))
_log = structlog.get_logger("app.requests")


class ObserveMiddleware:
    """Gives each request its id, counts and logs it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, metrics: Metrics, stall_seconds: float) -> None:
        self._app = app
        self._metrics = metrics
        self._stall = stall_seconds
        self._logs_all = logging.getLogger("app.requests").isEnabledFor(logging.DEBUG)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        request_id = scope["request_id"] = _request_id(scope)
        exchange = _Exchange(receive, send, request_id, self._stall)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            _log.info("client went away", path=scope["path"], request_id=request_id)
        except Exception as error:  # noqa: BLE001 - nothing may get out
            # A refusal after the first byte arrives as the cause of the framework's complaint.
            refusal = error.__cause__
            if exchange.status and isinstance(refusal, BonsaiLoraError):
                _log.warning("answer broken off", reason=refusal.detail, request_id=request_id)
                return
            _log.exception("unexpected error", path=scope["path"], request_id=request_id)
            if not exchange.status:
                await fault_response(scope)(scope, receive, exchange.send)
        finally:
            self._observe(scope, exchange.status, perf_counter() - started)

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._metrics.count_request(method, route, status, seconds)
        changed = scope["method"] in ("PUT", "DELETE") or status == 201
        worth = changed or status >= 400 or seconds > SLOW_SECONDS or not status
        if not worth and not self._logs_all:
            return
        problem = scope.get("problem")
        about = {} if problem is None else {"code": problem.code, "detail": problem.detail[:300]}
        (_log.info if worth else _log.debug)(
            f"{status} {scope['method']} {scope['path'][:300]}",
            **about,
            ms=round(seconds * 1000, 2),
            request_id=scope["request_id"],
        )


class _Exchange:
    """What goes in and out for one request; raises StalledError where the client stands still."""

    __slots__ = ("_ended", "_receive", "_request_id", "_send", "_stall", "status")

    def __init__(self, receive: Receive, send: Send, request_id: str, stall: float) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._stall = stall
        self._ended = False
        self.status = 0

    async def receive(self) -> Message:
        """Return a part of the body, which must not take too long."""
        if self._ended:
            return await self._receive()
        message = await self._within_stall(self._receive(), "sent")
        self._ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the answer; the client of a stream must go on taking."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"].append((b"x-request-id", self._request_id.encode()))
        elif message.get("more_body"):
            await self._within_stall(self._send(message), "took")
            return
        await self._send(message)

    async def _within_stall(self, step: Awaitable[T], verb: str) -> T:
        """Return what `step` gives; raises StalledError where the client stands still."""
        # Most steps have their answer at once: then there is nothing to time. Taking the first one
        # by hand saves a timer and three system calls in each request.
        iterator = step.__await__()
        try:
            first = next(iterator)
        except StopIteration as done:
            return cast("T", done.value)
        try:
            async with asyncio.timeout(self._stall):
                return cast("T", await _continue(iterator, first))
        except TimeoutError:
            raise StalledError(f"the client {verb} nothing for {self._stall:g} s") from None


@types.coroutine
def _continue(iterator: Generator[Any, Any, T], yielded: Any) -> Generator[Any, Any, T]:
    """Go on with an awaitable that has yielded once already, as `yield from` would (PEP 380)."""
    try:
        while True:
            try:
                got = yield yielded
            except BaseException as error:  # noqa: BLE001 - all are the awaitable's
                yielded = iterator.throw(error)
            else:
                yielded = iterator.send(got)
    except StopIteration as done:
        return cast("T", done.value)


def _request_id(scope: Scope) -> str:
    """Return the caller's X-Request-Id where it is a plain token, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return str(value, "ascii")
    return f"{next(_numbers):016x}"

"""What happens to every request: an id, a count, a log line, and no exception out."""

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Mapping
from time import perf_counter
from typing import Any, TypeVar, cast

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonsai_lora.api.errors import fault_response
from bonsai_lora.api.metrics import Metrics
from bonsai_lora.api.request_head import REQUEST_ID
from bonsai_lora.api.steps import go_on
from bonsai_lora.errors import BonsaiLoraError, StalledError

T = TypeVar("T")

SLOW_SECONDS = 1.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_numbers = itertools.count(secrets.randbits(60))
_log = structlog.get_logger("bonsai_lora.requests")


class Observer:
    """Counts and logs what was answered."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logs_all = logging.getLogger("bonsai_lora.requests").isEnabledFor(logging.DEBUG)

    def observe(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count a request that was answered with `status` (0: not at all), and log it."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._metrics.count_request(method, route, status, seconds)
        changed = scope["method"] in ("PUT", "PATCH", "DELETE") or status == 201
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

    @staticmethod
    def note_disconnect(scope: Mapping[str, Any]) -> None:
        """Log that the client went away."""
        _log.info("client went away", path=scope["path"], request_id=scope["request_id"])

    @staticmethod
    def note_fault(scope: Mapping[str, Any]) -> None:
        """Log the exception that nobody expected."""
        _log.exception("unexpected error", path=scope["path"], request_id=scope["request_id"])


class ObserveMiddleware:
    """Gives each request its id, counts and logs it, and answers what no handler caught."""

    def __init__(self, app: ASGIApp, observer: Observer, stall_seconds: float) -> None:
        self._app = app
        self._observer = observer
        self._stall = stall_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        scope["request_id"] = request_id_of(given)
        exchange = _Exchange(receive, send, scope["request_id"], self._stall)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            self._observer.note_disconnect(scope)
        except Exception as error:  # noqa: BLE001 - nothing may get out
            # A refusal after the first byte arrives as the cause of the framework's complaint.
            refusal = error.__cause__
            if exchange.status and isinstance(refusal, BonsaiLoraError):
                reason, number = refusal.detail, scope["request_id"]
                _log.warning("answer broken off", reason=reason, request_id=number)
                return
            self._observer.note_fault(scope)
            if not exchange.status:
                await fault_response(scope)(scope, receive, exchange.send)
        finally:
            self._observer.observe(scope, exchange.status, perf_counter() - started)


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
            message["headers"].append((REQUEST_ID, self._request_id.encode()))
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
                return cast("T", await go_on(iterator, first))
        except TimeoutError:
            raise StalledError(f"the client {verb} nothing for {self._stall:g} s") from None


def request_id_of(given: bytes | None) -> str:
    """Return the caller's X-Request-Id where it is a plain token, else a new one."""
    if given is not None and _REQUEST_ID.match(given):
        return str(given, "ascii")
    return f"{next(_numbers):016x}"

"""Observe every request: assign an id, count it, log it, and handle unexpected exceptions."""

import asyncio
import itertools
import logging
import os
import re
import secrets
from collections.abc import Awaitable, Mapping
from time import perf_counter
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonsai_lora.api.coroutines import resume
from bonsai_lora.api.errors import failure_response
from bonsai_lora.api.metrics import Metrics
from bonsai_lora.errors import BonsaiLoraError, StalledError

T = TypeVar("T")

REQUEST_ID = b"x-request-id"
SLOW_SECONDS = 1.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_numbers = itertools.count(secrets.randbits(60))
_log = structlog.get_logger("bonsai_lora.requests")


class Observer:
    """Counts and logs requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logs_all = logging.getLogger("bonsai_lora.requests").isEnabledFor(logging.DEBUG)

    def observe(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count and log a request; `status` is 0 if it got no response."""
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
            f"{status} {scope['method']} {_printable(scope['path'][:300])}",
            **about,
            ms=round(seconds * 1000, 2),
            request_id=scope["request_id"],
        )

    @staticmethod
    def note_disconnect(scope: Mapping[str, Any]) -> None:
        """Log that the client disconnected."""
        path = _printable(scope["path"])
        _log.info("client disconnected", path=path, request_id=scope["request_id"])

    @staticmethod
    def note_failure(scope: Mapping[str, Any]) -> None:
        """Log an unexpected exception with its traceback."""
        path = _printable(scope["path"])
        _log.exception("unexpected error", path=path, request_id=scope["request_id"])


class ObserveMiddleware:
    """Gives each request an id, observes it, and answers 500 for exceptions without a handler."""

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
        keep_encoded_slashes(scope)
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        scope["request_id"] = request_id_of(given)
        exchange = _Exchange(receive, send, scope["request_id"], self._stall)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            self._observer.note_disconnect(scope)
        except Exception as error:  # noqa: BLE001 - nothing may get out
            # An error after the response has started is the cause of Starlette's exception.
            refusal = error.__cause__
            if exchange.status and isinstance(refusal, BonsaiLoraError):
                reason, number = refusal.detail, scope["request_id"]
                _log.warning(
                    "response aborted", code=refusal.code, reason=reason, request_id=number
                )
                return
            self._observer.note_failure(scope)
            if not exchange.status:
                await failure_response(scope)(scope, receive, exchange.send)
        finally:
            self._observer.observe(scope, exchange.status, perf_counter() - started)


class _Exchange:
    """The ASGI channels of one request; raises StalledError if the client stalls."""

    __slots__ = ("_ended", "_is_stalled", "_receive", "_request_id", "_send", "_stall", "status")

    def __init__(self, receive: Receive, send: Send, request_id: str, stall: float) -> None:
        self._receive = receive
        self._send = send
        self._request_id = request_id
        self._stall = stall
        self._ended = False
        self._is_stalled = False
        self.status = 0

    async def receive(self) -> Message:
        """Return the next part of the body, which must arrive within the stall timeout."""
        if self._ended:
            return await self._receive()
        message = await self._with_timeout(self._receive(), "sent")
        self._ended = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response; a client must keep reading a streamed one."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"].append((REQUEST_ID, self._request_id.encode()))
            if self._is_stalled:  # the rest of the body may never arrive
                message["headers"].append((b"connection", b"close"))
        elif message.get("more_body"):
            await self._with_timeout(self._send(message), "read")
            return
        await self._send(message)

    async def _with_timeout(self, step: Awaitable[T], verb: str) -> T:
        """Return the result of `step`; raises StalledError after the stall timeout."""
        # Most awaitables finish in their first step. Running that one by hand saves a timer and
        # three system calls per request.
        iterator = step.__await__()
        try:
            first = next(iterator)
        except StopIteration as done:
            return cast("T", done.value)
        try:
            async with asyncio.timeout(self._stall):
                return cast("T", await resume(iterator, first))
        except TimeoutError:
            self._is_stalled = True
            raise StalledError(
                f"the client {verb} nothing for {self._stall:g} s; retry on a faster connection, "
                "or raise stall_seconds"
            ) from None


def keep_encoded_slashes(scope: Scope) -> None:
    """Leave each `%2F` in the path as it is: it is part of a name, and separates nothing."""
    raw: bytes = scope.get("raw_path") or b""
    if b"%2f" in raw.lower():
        pieces = re.split("%2f", raw.decode("ascii"), flags=re.IGNORECASE)
        scope["path"] = "%2F".join(map(unquote, pieces))


def decode_slashes(name: str) -> str:
    """Return the name of a file, which may have slashes, from a path parameter."""
    return name.replace("%2F", "/")


def _printable(text: str) -> str:
    """Return `text` with line ends and other control characters escaped: a path can hold any."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def request_id_of(given: bytes | None) -> str:
    """Return the client's X-Request-Id if it is a plain token, else a new id."""
    if given is not None and _REQUEST_ID.match(given):
        return str(given, "ascii")
    return f"{next(_numbers):016x}"


def _renumber() -> None:
    """Start another sequence, in a worker that was forked."""
    global _numbers  # noqa: PLW0603 - a process has one sequence
    _numbers = itertools.count(secrets.randbits(60))


os.register_at_fork(after_in_child=_renumber)

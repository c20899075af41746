"""Observe every request: assign an id, count it, log it, and handle unexpected exceptions."""

import asyncio
import itertools
import logging
import math
import os
import re
import secrets
from collections.abc import Awaitable, Mapping
from functools import partial
from time import perf_counter
from typing import Any, TypeVar, cast
from urllib.parse import unquote

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonsai_lora.api.body import parse_length
from bonsai_lora.api.call import closes
from bonsai_lora.api.context import Context
from bonsai_lora.api.coroutines import resume
from bonsai_lora.api.errors import failure_response
from bonsai_lora.api.metrics import Metrics
from bonsai_lora.api.pace import Pace
from bonsai_lora.errors import BonsaiLoraError, BusyError
from bonsai_lora.formats.text import printable

T = TypeVar("T")

REQUEST_ID = b"x-request-id"
TRACEPARENT = b"traceparent"
SLOW_SECONDS = 1.0
_BUSY_LINES_PER_SECOND = 10
"""Log lines for `busy` refusals: writing one takes as long as the refusal itself."""

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
_TRACEPARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_numbers = itertools.count(secrets.randbits(60))
_log = structlog.get_logger("bonsai_lora.requests")


class Observer:
    """Counts and logs requests."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._busy_refusals = 0
        """Since the first one of this second."""
        self._logs_all = logging.getLogger("bonsai_lora.requests").isEnabledFor(logging.DEBUG)

    def observe(self, scope: Mapping[str, Any], status: int, seconds: float) -> None:
        """Count and log a request; `status` is 0 if it got no response."""
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._metrics.count_request(method, route, status, seconds)
        problem = scope.get("problem")
        if problem is not None:
            self._metrics.count_refusal(problem.code)
        changed = scope["method"] in ("PUT", "PATCH", "DELETE") or status == 201
        if problem is not None and problem.code == BusyError.code and self._leaves_out():
            return
        worth = changed or status >= 400 or seconds > SLOW_SECONDS or not status
        if worth or self._logs_all:
            about = (
                {} if problem is None else {"code": problem.code, "detail": problem.detail[:300]}
            )
            (_log.info if worth else _log.debug)(
                "request", status=status, ms=round(seconds * 1000, 2), **about, **_fields(scope)
            )

    def _leaves_out(self) -> bool:
        """Return whether to log nothing about a busy refusal; say later how many were left out."""
        if not self._busy_refusals:
            asyncio.get_running_loop().call_later(1.0, self._end_second)
        self._busy_refusals += 1
        return self._busy_refusals > _BUSY_LINES_PER_SECOND

    def _end_second(self) -> None:
        left_out = self._busy_refusals - _BUSY_LINES_PER_SECOND
        self._busy_refusals = 0
        if left_out > 0:
            _log.info("more requests were refused as busy", left_out=left_out)

    @staticmethod
    def note_disconnect(scope: Mapping[str, Any]) -> None:
        """Log that the client disconnected."""
        _log.info("client disconnected", **_fields(scope))

    @staticmethod
    def note_failure(scope: Mapping[str, Any]) -> None:
        """Log an unexpected exception with its traceback."""
        _log.exception("unexpected error", **_fields(scope))


def _fields(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a log line says about a request, without what the request does not have."""
    path_params = scope.get("path_params", {})
    name = path_params.get("set", path_params.get("model"))
    fields = {
        "method": scope["method"],
        "path": printable(scope["path"][:300]),
        "route": getattr(scope.get("route"), "path", None),
        "set": None if name is None else printable(name[:300]),
        "rows": scope.get("rows"),
        "key": scope.get("key"),
        "request_id": scope["request_id"],
        "trace_id": scope.get("trace_id"),
    }
    return {field: value for field, value in fields.items() if value is not None}


class ObserveMiddleware:
    """Gives each request an id, observes it, and answers 500 for exceptions without a handler."""

    def __init__(self, app: ASGIApp, observer: Observer, context: Context) -> None:
        self._app = app
        self._observer = observer
        self._new_pace = partial(Pace, context.settings.stall_seconds, context.is_crowded)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        keep_encoded_slashes(scope)
        given = next((value for name, value in scope["headers"] if name == REQUEST_ID), None)
        scope["request_id"] = request_id_of(given)
        parents = [value for name, value in scope["headers"] if name == TRACEPARENT]
        scope["trace_id"] = trace_id_of(b", ".join(parents))
        exchange = _Exchange(scope, receive, send, self._new_pace())
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            self._observer.note_disconnect(scope)
        except Exception as error:  # noqa: BLE001 - nothing may get out
            # An error after the response has started is the cause of Starlette's exception.
            refusal = error.__cause__
            if exchange.status and isinstance(refusal, BonsaiLoraError):
                _log.warning(
                    "response aborted",
                    code=refusal.code,
                    reason=refusal.detail,
                    **_fields(scope),
                )
                return
            self._observer.note_failure(scope)
            if not exchange.status:
                await failure_response(scope)(scope, receive, exchange.send)
        finally:
            self._observer.observe(scope, exchange.status, perf_counter() - started)


class _Exchange:
    """The ASGI channels of one request; raises StalledError if the client sends too slowly."""

    __slots__ = ("_missing", "_pace", "_receive", "_scope", "_send", "status")

    def __init__(self, scope: Scope, receive: Receive, send: Send, pace: Pace) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._pace = pace
        self._missing: float | None = None
        """Bytes of the body that are still to be received; None before it is read."""
        self.status = 0

    async def receive(self) -> Message:
        """Return the next part of the body, which must arrive in time."""
        if self._missing is None:
            self._missing = _body_bytes(self._scope)
        if self._missing == 0:
            return await self._receive()
        message = await self._in_time(self._receive())
        received = len(message.get("body", b""))
        self._pace.note(0, received)
        self._missing = max(1, self._missing - received) if message.get("more_body") else 0
        return message

    async def send(self, message: Message) -> None:
        """Send a part of the response; after a refusal, a long rest of the body is not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"].append((REQUEST_ID, self._scope["request_id"].encode()))
            if self.status >= 400 and self._is_last():
                message["headers"].append((b"connection", b"close"))
        await self._send(message)

    def _is_last(self) -> bool:
        """Return whether the connection is closed after this refusal."""
        missing = _body_bytes(self._scope) if self._missing is None else self._missing
        return self._pace.left_seconds <= 0 or closes(self.status, missing)

    async def _in_time(self, step: Awaitable[T]) -> T:
        """Return the result of `step`; raises StalledError if the client has no time left."""
        # Most awaitables finish in their first step. Running that one by hand saves a timer and
        # three system calls per request.
        iterator = step.__await__()
        try:
            first = next(iterator)
        except StopIteration as done:
            return cast("T", done.value)
        began = perf_counter()
        try:
            async with asyncio.timeout(self._pace.left_seconds):
                return cast("T", await resume(iterator, first))
        except TimeoutError:
            raise self._pace.too_slow() from None
        finally:
            self._pace.note(perf_counter() - began, 0)


def _body_bytes(scope: Scope) -> float:
    """Return the declared length of the body in bytes: infinite if it is chunked, 0 if none."""
    length = 0.0
    for name, value in scope["headers"]:
        if name == b"content-length":
            length = parse_length(value)
        elif name == b"transfer-encoding":
            return math.inf
    return length


def keep_encoded_slashes(scope: Scope) -> None:
    """Leave each `%2F` in the path as it is: it is part of a name, and separates nothing."""
    raw: bytes = scope.get("raw_path") or b""
    if b"%2f" in raw.lower():
        pieces = re.split("%2f", raw.decode("ascii"), flags=re.IGNORECASE)
        scope["path"] = "%2F".join(map(unquote, pieces))


def decode_slashes(name: str) -> str:
    """Return the name of a file, which may have slashes, from a path parameter."""
    return name.replace("%2F", "/")


def request_id_of(given: bytes | None) -> str:
    """Return the client's X-Request-Id if it is a plain token, else a new id."""
    if given is not None and _REQUEST_ID.match(given):
        return str(given, "ascii")
    return f"{next(_numbers):016x}"


def trace_id_of(parent: bytes) -> str | None:
    """Return the trace id of a `traceparent` header, or None if it is not valid.

    Source: W3C Trace Context, section 3.2; version 00.
    """
    found = _TRACEPARENT.fullmatch(parent)
    return None if found is None else str(found[1], "ascii")


def _renumber() -> None:
    """Start another sequence, in a worker that was forked."""
    global _numbers  # noqa: PLW0603 - a process has one sequence
    _numbers = itertools.count(secrets.randbits(60))


os.register_at_fork(after_in_child=_renumber)

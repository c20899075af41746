"""What happens to every request: an id, a count, a log line, and no exception out."""

import asyncio
import logging
import re
import secrets
from collections.abc import Awaitable
from time import perf_counter
from typing import TypeVar

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import fault_response
from app.api.metrics import Metrics
from app.errors import BonsaiLoraError, StalledError

T = TypeVar("T")

SLOW_SECONDS = 1.0

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}\Z")
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
        status = 0

        async def observed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            elif message.get("more_body"):  # a stream: its client must go on taking
                await self._within_stall(send(message), "took")
                return
            await send(message)

        try:
            await self._app(scope, self._bounded(receive), observed_send)
        except ClientDisconnect:
            _log.info("client went away", path=scope["path"], request_id=request_id)
        except Exception as error:  # noqa: BLE001 - nothing may get out
            # A refusal after the first byte arrives as the cause of the framework's complaint.
            refusal = error.__cause__
            if status and isinstance(refusal, BonsaiLoraError):
                _log.warning("answer broken off", reason=refusal.detail, request_id=request_id)
                return
            _log.exception("unexpected error", path=scope["path"], request_id=request_id)
            if not status:
                await fault_response(scope)(scope, receive, observed_send)
        finally:
            self._observe(scope, status, perf_counter() - started)

    def _bounded(self, receive: Receive) -> Receive:
        """Return `receive` that raises where the client stands still in the middle of its body."""
        ended = False

        async def bounded() -> Message:
            nonlocal ended
            if ended:
                return await receive()
            message = await self._within_stall(receive(), "sent")
            ended = not message.get("more_body", False)
            return message

        return bounded

    async def _within_stall(self, step: Awaitable[T], verb: str) -> T:
        """Return what `step` gives; raises StalledError where the client stands still."""
        task = asyncio.current_task()
        assert task is not None
        late = False

        def end() -> None:
            nonlocal late
            late = True
            task.cancel()

        # What asyncio.timeout does, at an eighth of its cost: this is on the way of every request.
        timer = asyncio.get_running_loop().call_later(self._stall, end)
        try:
            return await step
        except asyncio.CancelledError:
            if not late or task.uncancel() > 0:
                raise
            raise StalledError(f"the client {verb} nothing for {self._stall:g} s") from None
        finally:
            timer.cancel()

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


def _request_id(scope: Scope) -> str:
    """Return the caller's X-Request-Id where it is a plain token, else a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return str(value, "ascii")
    return secrets.token_hex(8)

"""What happens to every request: an id, a count, a log line, and no exception out."""

import re
import secrets
from collections.abc import Awaitable
from time import perf_counter
from typing import TypeVar

import anyio
import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.errors import problem_response
from app.api.metrics import Metrics
from app.errors import BonsaiLoraError, InternalError, StalledError

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
                MutableHeaders(scope=message).append("X-Request-Id", request_id)
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
                problem = InternalError(
                    "something failed here; the log has the cause under this request id"
                )
                await problem_response(problem, scope)(scope, receive, observed_send)
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
        try:
            with anyio.fail_after(self._stall):
                return await step
        except TimeoutError:
            raise StalledError(f"the client {verb} nothing for {self._stall:g} s") from None

    def _observe(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if route != "none" else "any"
        self._metrics.requests.labels(method, route, str(status)).inc()
        self._metrics.latency.labels(method, route).observe(seconds)
        changed = scope["method"] in ("PUT", "DELETE") or status == 201
        worth = changed or status >= 400 or seconds > SLOW_SECONDS or not status
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

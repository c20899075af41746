"""One request to a fast-lane route, tied to its connection."""

from collections.abc import Coroutine
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bonsai_lora.api.body import LONG_BYTES
from bonsai_lora.api.call import Call, closes
from bonsai_lora.api.coroutines import resume
from bonsai_lora.api.errors import (
    failure_response,
    problem_response,
)
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.api.pace import Pace
from bonsai_lora.errors import BonsaiLoraError, TooManyFilesError, is_out_of_files
from bonsai_lora.fast_lane.head import RequestHead
from bonsai_lora.fast_lane.routes import RouteMatch
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.wire.buffers import Buffer

if TYPE_CHECKING:
    from bonsai_lora.fast_lane.protocol import LaneProtocol

_BATCH_SECONDS = 1e-4
"""A response that took longer than this to compute is not held back for batching."""
_ALIGNMENT = 16
"""Alignment in bytes of the memory that NumPy allocates."""


class LaneCall(Call):
    """A call that reads its body from a connection and writes its response there."""

    __slots__ = (
        "_body",
        "_head",
        "_http",
        "_is_stalled",
        "_match",
        "_status",
        "is_started",
        "keep_alive",
        "missing",
    )

    def __init__(self, http: "LaneProtocol", head: RequestHead, match: RouteMatch) -> None:
        # The part of an ASGI scope that logging, metrics and error responses read.
        scope = {
            "method": "POST",
            "path": head.path,
            "request_id": request_id_of(head.request_id),
            "trace_id": head.trace_id,
            "route": match.route.scope_route,
            "path_params": match.path_params,
        }
        super().__init__(http.lane.context, scope, head.headers, head.query_string, head.length)
        self._http = http
        self._head = head
        self._match = match
        self._body: Buffer = b""
        self.missing = head.length
        """Bytes of the body that are still to be received."""
        self._is_stalled = False
        self._status = 0
        self.is_started = False
        """Whether the route's function has been called."""
        self.keep_alive = True

    def feed(self, data: bytes) -> bytes:
        """Append `data` to the body; return the bytes after its end.

        Starts the route's function once the body is complete. A body longer than LONG_BYTES is
        started immediately and reads its rest by itself.
        """
        missing = self.missing
        if data and missing:
            self._body = bytes(self._body) + data[:missing]
            self.missing = self._head.length - len(self._body)
        if not self.is_started:
            if not self.missing or self._head.length > LONG_BYTES:
                self._start()
            elif self._head.expects and not self._body:
                self._http.send_continue()
        return data[missing:]

    def stall(self) -> None:
        """Start the route's function, which then raises StalledError for the missing body."""
        self._is_stalled = True
        self._start()

    def _start(self) -> None:
        """Run the call synchronously up to its first await; finish it in a task if it has one."""
        http = self._http
        self.is_started = True
        coroutine = self._serve()
        try:
            yielded = coroutine.send(None)
        except StopIteration:
            return
        task = http.loop.create_task(_finish(coroutine, yielded))
        http.tasks.add(task)
        task.add_done_callback(http.tasks.discard)

    async def _serve(self) -> None:
        started = perf_counter()
        observer, scope = self._http.lane.observer, self.scope
        try:
            self._write(await self._answer())
        except ClientDisconnect:
            observer.note_disconnect(scope)
        except Exception:  # noqa: BLE001 - nothing may get out
            observer.note_failure(scope)
            if not self._status and not self._http.transport.is_closing():
                self._write(failure_response(scope))
        finally:
            seconds = perf_counter() - started
            if seconds > _BATCH_SECONDS:
                self._http.flush()
            observer.observe(scope, self._status, seconds)
            if self._http.flow.write_paused:
                await self._http.flow.drain()
            self.close()
            self._http.end_call(self)

    async def _answer(self) -> Response:
        """Return the response of the route's function, or an error response."""
        try:
            caller = self._http.lane.authenticator.admit(
                self._head.path, self.headers, self._http.peer
            )
            self.scope["key"] = caller.log_id
            self.context = caller.context(self._match.route.need)
            return await self._match.route.endpoint(self, *self._match.path_params.values())
        except BonsaiLoraError as error:
            if self.missing and self._head.expects:
                self.keep_alive = False  # the client may or may not send the body
            return problem_response(error, self.scope)
        except OSError as error:
            if not is_out_of_files(error):
                raise
            return problem_response(TooManyFilesError(), self.scope)

    def _write(self, answer: Response) -> None:
        http = self._http
        if http.transport.is_closing():
            raise ClientDisconnect
        parts = getattr(answer, "parts", None) or (answer.body,)
        if self.missing and closes(answer.status_code, self.missing):
            self.keep_alive = False
        lines = [*answer.raw_headers, *http.lane.more_headers]
        lines.append((b"x-request-id", self.scope["request_id"].encode()))
        http.write_response(answer.status_code, lines, parts, keep_alive=self.keep_alive)
        self._status = answer.status_code

    async def _read(self, limit: int) -> Buffer:
        del limit  # `body` has checked the declared length
        if self.missing:
            await self._read_rest(self.context.settings.stall_seconds)
        return self._body

    async def _read_rest(self, stall_seconds: float) -> None:
        """Read the missing bytes from the socket straight into an array."""
        http = self._http
        if self._is_stalled:
            self.keep_alive = False
            raise Pace(stall_seconds, self.context.is_crowded).too_slow()
        try:
            if self._head.expects and not self._body:
                http.send_continue()
            # Align the binary data, which begins after a JSON header of declared length.
            shift = -self._head.data_start % _ALIGNMENT
            room = np.empty(shift + self._head.length, np.uint8)
            target = as_bytes(room[shift:])
            filled = len(self._body)
            target[:filled] = self._body
            self._body, self.missing = target, 0  # the connection knows how much it has read
            begin = partial(self.begin_long, self._head.length)
            await http.fill(target, filled, stall_seconds, begin)
        except BaseException:
            self.keep_alive = False  # the rest of the body would be parsed as a request
            self._body, self.missing = b"", self._head.length
            raise


async def _finish(coroutine: Coroutine[Any, Any, None], yielded: Any) -> None:
    # asyncio accepts only native coroutines, which the result of `types.coroutine` is not.
    await resume(coroutine, yielded)

"""One request to a route of the fast lane, on the connection that it came by."""

import asyncio
from collections.abc import Coroutine, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bonsai_lora.api.call import Call, Lines
from bonsai_lora.api.errors import fault_response, problem_response
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.api.steps import go_on
from bonsai_lora.errors import BonsaiLoraError, StalledError
from bonsai_lora.fast_lane.head import RequestHead
from bonsai_lora.fast_lane.routes import FastLane, Found
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.wire.buffers import Buffer

LONG_BYTES = 1 << 16
"""Most that is read between requests: longer bodies go into their array from there on."""
_ALIGNMENT = 16
"""Of what NumPy allocates."""


class Carrier(Protocol):
    """The connection of a `LaneCall`: `LaneProtocol` in app/bonsai_lora/fast_lane/protocol.py."""

    lane: FastLane
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[None]]
    transport: asyncio.Transport

    async def fill(self, target: memoryview, filled: int, stall_seconds: float) -> None:
        """Read the rest of a body."""

    def proceed(self) -> None:
        """Tell the client to send its body."""

    def write_answer(
        self, status: int, lines: Lines, parts: Sequence[Buffer], *, keep_alive: bool
    ) -> None:
        """Write an answer."""

    def end_call(self, call: "LaneCall") -> None:
        """Get ready for the next request."""


class LaneCall(Call):
    """A call whose body comes by a `Carrier`, and whose answer goes there."""

    __slots__ = (
        "_body",
        "_found",
        "_head",
        "_http",
        "_is_stalled",
        "_scope",
        "_status",
        "is_started",
        "keep_alive",
    )

    def __init__(self, http: Carrier, head: RequestHead, found: Found) -> None:
        super().__init__(http.lane.context, head.headers, head.query_string)
        self._http = http
        self._head = head
        self._found = found
        self._body: Buffer = b""
        # What logs, counts and refusals read; under the names of an ASGI scope.
        self._scope: dict[str, Any] = {
            "method": "POST",
            "path": head.path,
            "request_id": request_id_of(head.request_id),
            "route": found.route.about,
        }
        self._is_stalled = False
        self._status = 0
        self.is_started = False
        """Whether the route's function has been called."""
        self.keep_alive = True

    @property
    def missing(self) -> int:
        """Bytes of the body that have not come."""
        return self._head.length - len(self._body)

    def take(self, data: bytes) -> bytes:
        """Add to the body, and start when it is whole, or too long to wait for.

        Returns what does not belong to it.
        """
        missing = self.missing
        if data and missing:
            self._body = bytes(self._body) + data[:missing]
        if not self.is_started:
            if missing <= len(data) or self._head.length > LONG_BYTES:
                self._start()
            elif self._head.expects and not self._body:
                self._http.proceed()
        return data[missing:]

    def stall(self) -> None:
        """Let the route refuse a body that does not come."""
        self._is_stalled = True
        self._start()

    def _start(self) -> None:
        """Serve: at once where nothing has to be waited for, else in a task."""
        http = self._http
        self.is_started = True
        steps = self._serve()
        try:
            yielded = steps.send(None)
        except StopIteration:
            return
        task = http.loop.create_task(_rest(steps, yielded))
        http.tasks.add(task)
        task.add_done_callback(http.tasks.discard)

    async def _serve(self) -> None:
        started = perf_counter()
        observer, scope = self._http.lane.observer, self._scope
        try:
            self._write(await self._answer())
        except ClientDisconnect:
            observer.note_disconnect(scope)
        except Exception:  # noqa: BLE001 - nothing may get out
            observer.note_fault(scope)
            if not self._status and not self._http.transport.is_closing():
                self._write(fault_response(scope))
        finally:
            observer.observe(scope, self._status, perf_counter() - started)
            self._http.end_call(self)

    async def _answer(self) -> Response:
        """Return what the route's function answers, or its refusal."""
        try:
            return await self._found.route.endpoint(self, *self._found.names)
        except BonsaiLoraError as error:
            if self.missing and self._head.expects:
                self.keep_alive = False  # nobody knows whether the body will come
            return problem_response(error, self._scope)

    def _write(self, answer: Response) -> None:
        http = self._http
        if http.transport.is_closing():
            raise ClientDisconnect
        parts = getattr(answer, "parts", None) or (answer.body,)
        lines = [*answer.raw_headers, (b"x-request-id", self._scope["request_id"].encode())]
        http.write_answer(answer.status_code, lines, parts, keep_alive=self.keep_alive)
        self._status = answer.status_code

    async def _read(self, limit: int) -> Buffer:
        del limit  # the length was declared
        if self.missing:
            await self._read_rest(self.context.settings.stall_seconds)
        return self._body

    async def _read_rest(self, stall_seconds: float) -> None:
        """Read what is missing from the socket into an array."""
        http = self._http
        if self._is_stalled:
            self.keep_alive = False
            raise stalled(stall_seconds)
        try:
            if self._head.expects and not self._body:
                http.proceed()
            # Aligned for the numbers behind a header whose length the head tells.
            shift = -self._head.data_start % _ALIGNMENT
            room = np.empty(shift + self._head.length, np.uint8)
            target = as_bytes(room[shift:])
            filled = len(self._body)
            target[:filled] = self._body
            self._body = target  # what comes behind it is another request's
            await http.fill(target, filled, stall_seconds)
        except BaseException:
            self.keep_alive = False  # the rest of the body would be taken for a request
            raise


def stalled(seconds: float) -> StalledError:
    """Return the refusal of a body that does not come."""
    return StalledError(f"the client sent nothing for {seconds:g} s")


async def _rest(steps: Coroutine[Any, Any, None], yielded: Any) -> None:
    # A task wants a coroutine, and what `types.coroutine` makes is none to asyncio.
    await go_on(steps, yielded)

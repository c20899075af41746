"""One request to a hot route, on the connection that it came by."""

import asyncio
from collections.abc import Coroutine, Sequence
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from bonsai_lora.api.call import Call, Lines, Recalled
from bonsai_lora.api.errors import fault_response
from bonsai_lora.api.hot import Found, HotRoutes, Planned
from bonsai_lora.api.middleware import request_id_of
from bonsai_lora.api.request_head import RequestHead
from bonsai_lora.api.steps import go_on
from bonsai_lora.errors import StalledError
from bonsai_lora.formats.safetensors import as_bytes
from bonsai_lora.wire.buffers import Buffer

DIRECT_BYTES = 1 << 16
"""Most that is read between requests: longer bodies go into their array from there on."""
_ALIGNMENT = 16
"""Of what NumPy allocates."""


class Carrier(Protocol):
    """The connection of a `DirectCall`: `DirectProtocol` in app/bonsai_lora/api/direct.py."""

    hot: HotRoutes
    loop: asyncio.AbstractEventLoop
    tasks: set[asyncio.Task[None]]
    transport: asyncio.Transport

    async def fill(self, target: memoryview, filled: int, stall_seconds: float) -> None:
        """Read the rest of a body."""

    def proceed(self) -> None:
        """Tell the client to send its body."""

    def answer_planned(
        self, head: RequestHead, found: Found, body: Buffer, *, keep_alive: bool
    ) -> bool:
        """Answer by a plan, if there is one."""

    def write(
        self,
        status: int,
        lines: Lines,
        parts: Sequence[Buffer],
        request_id: str,
        *,
        keep_alive: bool,
    ) -> None:
        """Write an answer."""

    def end_call(self, call: "DirectCall") -> None:
        """Get ready for the next request."""


class DirectCall(Call):
    """A request to a hot route, on the connection that it came by."""

    __slots__ = (
        "_body",
        "_found",
        "_head",
        "_http",
        "_is_stalled",
        "_may_be_planned",
        "_scope",
        "_status",
        "is_started",
        "keep_alive",
    )

    can_plan = True

    def __init__(
        self, http: Carrier, head: RequestHead, found: Found, *, may_be_planned: bool
    ) -> None:
        super().__init__(head.headers, head.query_string)
        self._http = http
        self._head = head
        self._found = found
        self._body: Buffer = b""
        self._scope = scope_of(head)
        self._may_be_planned = may_be_planned
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
            if missing <= len(data) or self._head.length > DIRECT_BYTES:
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
        # It came in pieces, but now it is whole.
        may_be_planned = self._may_be_planned and not self.missing
        if may_be_planned and http.answer_planned(
            self._head, self._found, self._body, keep_alive=self.keep_alive
        ):
            http.end_call(self)
            return
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
        hot, scope = self._http.hot, self._scope
        try:
            refusal = await hot.answer(self._found, self, scope)
            if refusal is not None:
                self._refuse(refusal)
        except ClientDisconnect:
            hot.observer.note_disconnect(scope)
        except Exception:  # noqa: BLE001 - nothing may get out
            hot.observer.note_fault(scope)
            if not self._status and not self._http.transport.is_closing():
                self._refuse(fault_response(scope))
        finally:
            hot.observer.observe(scope, self._status, perf_counter() - started)
            self._http.end_call(self)

    async def _read(self, limit: int, stall_seconds: float) -> Buffer:
        del limit  # the length was declared
        if self.missing:
            await self._read_rest(stall_seconds)
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

    def find_plan(self, body: Buffer) -> Recalled | None:
        """Return the plan of a request like this."""
        # Short bodies were looked into when they had come.
        may_take = len(body) > DIRECT_BYTES
        recalled = self._http.hot.recall(self._head, self._found, body, may_take=may_take)
        return None if recalled is None else (recalled[0].plan, recalled[1])

    async def _send_answer(self, lines: Lines, parts: Sequence[Buffer]) -> None:
        self._write(200, lines, parts)
        if self._noted is not None:
            stored, form, plan, model = self._noted
            planned = Planned(plan, lines, model)
            self._http.hot.remember(stored, self._head, form, planned)

    def _refuse(self, response: Response) -> None:
        if self.missing and self._head.expects:
            self.keep_alive = False  # nobody knows whether the body will come
        self._write(response.status_code, response.raw_headers, (response.body,))

    def _write(self, status: int, lines: Lines, parts: Sequence[Buffer]) -> None:
        http, request_id = self._http, self._scope["request_id"]
        http.write(status, lines, parts, request_id, keep_alive=self.keep_alive)
        self._status = status


def scope_of(head: RequestHead) -> dict[str, Any]:
    """Return what logs, counts and refusals want to know of a request."""
    return {
        "method": "POST",
        "path": head.path,
        "request_id": request_id_of(head.request_id),
    }


def stalled(seconds: float) -> StalledError:
    """Return the refusal of a body that does not come."""
    return StalledError(f"the client sent nothing for {seconds:g} s")


async def _rest(steps: Coroutine[Any, Any, None], yielded: Any) -> None:
    # A task wants a coroutine, and what `types.coroutine` makes is none to asyncio.
    await go_on(steps, yielded)

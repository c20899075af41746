"""The ASGI middleware that asks the door about each request before it is routed."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonsai_lora.api.call import join_headers
from bonsai_lora.api.door import PRIVATE, Caller, Door, address_of
from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.scopes import is_open, is_signed
from bonsai_lora.errors import BonsaiLoraError


class EntranceMiddleware:
    """Puts the caller of each request into the scope, or answers with the reason to refuse it."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _privately(send) if self._door.has_keys and not is_open(scope["path"]) else send
        try:
            caller = scope["caller"] = self._admit(scope)
        except BonsaiLoraError as error:
            await problem_response(error, scope)(scope, receive, answer)
            return
        scope["key"] = caller.log_id
        await self._app(scope, receive, answer)

    def _admit(self, scope: Scope) -> Caller:
        door, path, headers = self._door, scope["path"], join_headers(scope["headers"])
        peer = door.peer_of(scope.get("server"), scope.get("client"))
        door.check_site(scope["method"], path, headers, peer)
        scope["address"] = address_of(scope["scheme"], headers, peer)
        if is_open(path) or is_signed(scope["method"], path):
            return door.visitor
        return door.identify(headers)


def _privately(send: Send) -> Send:
    """Return a `send` that tells shared caches to keep no answer to a caller with a key."""

    async def send_privately(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("cache-control", PRIVATE)
        await send(message)

    return send_privately

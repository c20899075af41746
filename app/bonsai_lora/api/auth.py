"""Who is calling, and whether they may: the one check of every request.

FastAPI runs it through `AuthMiddleware`; the fast lane calls `Authenticator` itself.
"""

import base64
import binascii
import time
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from bonsai_lora.api.browsers import check_host, check_origin
from bonsai_lora.api.call import join_headers
from bonsai_lora.api.context import Context
from bonsai_lora.api.errors import problem_response
from bonsai_lora.api.keys_file import WatchedKeys
from bonsai_lora.api.scopes import OPEN, SIGNED, Need, is_health, is_open, is_signed
from bonsai_lora.errors import BonsaiLoraError, UnauthenticatedError
from bonsai_lora.service.keys import ANYONE, NOBODY, Key, Meter, Scope, check_scope
from bonsai_lora.settings import Settings

_REMEMBERED = 1024
"""Most callers and hosts to remember by the bytes of their headers."""
_REMEMBERED_BYTES = 256
"""Longest header to remember."""

PRIVATE = "private"
"""Cache-Control of answers to callers with keys."""

Headers = Mapping[bytes, bytes]
"""Values by lower-case name."""


class Peer(NamedTuple):
    """The other end of a connection."""

    is_local: bool
    """Whether it came through a Unix socket, whose file permissions decide who connects."""
    is_proxy: bool
    """Whether its X-Forwarded headers are true."""


class Caller:
    """A key in use: its meter, and a context for each scope."""

    def __init__(self, key: Key, meter: Meter, base: Context) -> None:
        self.key = key
        self.meter = meter
        self._base = base
        self._contexts: dict[Need, Context] = {}
        self.log_id = key.id if key.digest else None
        """Id of the key; None for anyone and nobody."""

    def context(self, need: Need) -> Context:
        """Return the context for a call that needs the scope `need`; raises ForbiddenError."""
        found = self._contexts.get(need)
        if found is None:
            scope: Scope = "read" if need in (OPEN, SIGNED) else need
            if need not in (OPEN, SIGNED):
                check_scope(self.key, scope)
            found = self._contexts[need] = self._base.seen_by(self.key, scope, self.meter)
        return found


class Authenticator:
    """Finds the caller of each request, and refuses what may not be served."""

    def __init__(self, settings: Settings, base: Context) -> None:
        """Read the keys; raises KeysFileError."""
        self._allowed = frozenset(one.lower() for one in settings.allowed_hosts)
        self._origins = frozenset(settings.cors_origins)
        self._proxies = [ip_network(one) for one in settings.trusted_proxies]
        self._base = base
        self._share = 1 / settings.workers
        self._keys: WatchedKeys | None = None
        if settings.keys_file is not None:
            self._keys = WatchedKeys(settings.keys_file, base.metrics.keys_file_errors.inc)
        self.visitor = self._caller(NOBODY if self._keys else ANYONE)
        """The caller of what is open to everybody."""
        self._by_header: dict[bytes, Caller] = {}
        self._by_id: dict[str, Caller] = {}
        self._hosts: set[bytes] = set()

    @property
    def has_keys(self) -> bool:
        """Whether calls need a key."""
        return self._keys is not None

    def peer_of(self, server: Any, client: Any) -> Peer:
        """Return the peer of a connection, given the addresses of an ASGI scope."""
        is_local = server is not None and server[1] is None
        return Peer(is_local, is_local or (client is not None and self._is_proxy(client[0])))

    def _is_proxy(self, host: str) -> bool:
        try:
            address: IPv4Address | IPv6Address = ip_address(host)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)

    def admit(self, path: str, headers: Headers, peer: Peer) -> Caller:
        """Return the caller of a POST without an Origin, which the fast lane serves.

        Raises the errors of `check_site` and `identify`.
        """
        self.check_site("POST", path, headers, peer)
        return self.identify(headers)

    def check_site(self, method: str, path: str, headers: Headers, peer: Peer) -> None:
        """Refuse what a web page of a different site may have sent.

        Raises MisdirectedRequestError, CrossSiteError, UnsupportedMediaTypeError.
        """
        host = _host_of(headers, peer)
        if not (self._keys or peer.is_local or host in self._hosts or is_health(path)):
            check_host(host, self._allowed)
            _forget_some(self._hosts)
            if len(host) <= _REMEMBERED_BYTES:
                self._hosts.add(host)
        if b"origin" in headers:
            check_origin(method, path, headers, host, self._origins)

    def identify(self, headers: Headers) -> Caller:
        """Return the caller, and count the request; raises UnauthenticatedError, RateLimitedError.

        Without keys, it is anyone. Costs a look-up by the header's bytes for a key seen before.
        """
        if self._keys is None:
            return self.visitor
        self._forget_old(self._keys)
        header = headers.get(b"authorization", b"")
        return _counted(self._by_header.get(header) or self._authenticate(header))

    def caller_of(self, number: str) -> Caller:
        """Return the caller whose key has this id, as `identify` does; anyone without keys."""
        if self._keys is None:
            return self.visitor
        self._forget_old(self._keys)
        key = self._keys.ring.keys.get(number)
        if key is None:
            raise UnauthenticatedError(
                f"there is no key {number[:16]!r} any more; ask the operator for one"
            )
        return _counted(self._known(key))

    def _forget_old(self, keys: WatchedKeys) -> None:
        """Forget callers whose keys are gone, if the file has changed."""
        if keys.is_changed():
            self._by_header.clear()
            kept = self._by_id.keys() & keys.ring.keys
            self._by_id = {number: self._by_id[number] for number in kept}

    def _authenticate(self, header: bytes) -> Caller:
        assert self._keys is not None
        token = _token_of(header)
        key = None if token is None else self._keys.ring.find(token)
        if key is None:
            raise UnauthenticatedError(_why_no_key(header, token))
        known = self._known(key)
        _forget_some(self._by_header)
        if len(header) <= _REMEMBERED_BYTES:
            self._by_header[header] = known
        return known

    def _known(self, key: Key) -> Caller:
        known = self._by_id.get(key.id)
        if known is None or known.key is not key:
            self._by_id[key.id] = known = self._caller(key, known)
        return known

    def _caller(self, key: Key, before: Caller | None = None) -> Caller:
        """Return the caller for `key`, which goes on with what it has used of the same rates."""
        is_same = before is not None and before.key.rates == key.rates
        meter = before.meter if before and is_same else Meter(key, self._share)
        return Caller(key, meter, self._base)


def _counted(caller: Caller) -> Caller:
    """Count a request of `caller`; raises UnauthenticatedError if its key has expired."""
    if caller.key.expires_at <= time.time():
        raise UnauthenticatedError(
            f"the key {caller.key.id!r} has expired; ask the operator for a new one"
        )
    caller.meter.take_request()
    return caller


def address_of(scheme: str, headers: Headers, peer: Peer) -> str:
    """Return the address that the client called, such as `http://localhost:8000`."""
    if peer.is_proxy and b"x-forwarded-proto" in headers:
        scheme = headers[b"x-forwarded-proto"].rpartition(b",")[2].strip().decode("latin-1")
    return f"{scheme}://{_host_of(headers, peer).decode('latin-1')}"


def _host_of(headers: Headers, peer: Peer) -> bytes:
    if peer.is_proxy and b"x-forwarded-host" in headers:
        return headers[b"x-forwarded-host"].rpartition(b",")[2].strip()
    return headers.get(b"host", b"")


def _forget_some(remembered: dict[bytes, Caller] | set[bytes]) -> None:
    if len(remembered) >= _REMEMBERED:
        remembered.clear()


def _why_no_key(header: bytes, token: bytes | None) -> str:
    """Return why no key is known by an Authorization header, without showing it."""
    if token:
        return "the key is unknown; check it, or ask the operator for one"
    if token is None and header:
        return (
            "the Authorization header has no Bearer or Basic credentials; send it as "
            "Authorization: Bearer KEY"
        )
    return "the request has no key; send it as Authorization: Bearer KEY"


def _token_of(header: bytes) -> bytes | None:
    """Return the key of an Authorization header: a bearer's, or the password of Basic."""
    scheme, _, value = header.partition(b" ")
    value = value.strip()
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() != b"basic":
        return None
    try:
        return base64.b64decode(value, validate=True).partition(b":")[2]
    except binascii.Error:
        return None


class AuthMiddleware:
    """Puts the caller of each request into the scope, or answers with the reason to refuse it."""

    def __init__(self, app: ASGIApp, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = (
            _privately(send)
            if self._authenticator.has_keys and not is_open(scope["path"])
            else send
        )
        try:
            caller = scope["caller"] = self._admit(scope)
        except BonsaiLoraError as error:
            await problem_response(error, scope)(scope, receive, answer)
            return
        scope["key"] = caller.log_id
        await self._app(scope, receive, answer)

    def _admit(self, scope: AsgiScope) -> Caller:
        auth, path, headers = self._authenticator, scope["path"], join_headers(scope["headers"])
        peer = auth.peer_of(scope.get("server"), scope.get("client"))
        auth.check_site(scope["method"], path, headers, peer)
        scope["address"] = address_of(scope["scheme"], headers, peer)
        if is_open(path) or is_signed(scope["method"], path):
            return auth.visitor
        return auth.identify(headers)


def _privately(send: Send) -> Send:
    """Return a `send` that tells shared caches to keep no answer to a caller with a key."""

    async def send_privately(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("cache-control", PRIVATE)
        await send(message)

    return send_privately

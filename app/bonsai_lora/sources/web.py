"""Fetch files from web servers that may be hostile: no redirect, address or length on trust.

A host's addresses are checked, and the connection goes to the address that was checked, so that
the name cannot mean a different machine a moment later (DNS rebinding).
"""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import httpx
import orjson

from bonsai_lora.errors import BodyTooLargeError, SourceRefusedError, SourceUnreachableError
from bonsai_lora.sources.origins import Origin

_CONNECT_SECONDS = 5.0
_LEAST_BYTES_PER_SECOND = 1024
_MOST_REDIRECTS = 3
_MOST_INFO_BYTES = 1 << 22
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_COMMIT = re.compile("[0-9a-f]{40}")
_TRANSLATED = ip_network("64:ff9b::/96")
"""IPv6 addresses that stand for IPv4 ones (RFC 6052)."""

Sink = Callable[[bytes], None]


def commit_of(origin: Origin, repository: str, revision: str, stall: float) -> str:
    """Return the commit that a revision of a hub's repository means.

    Raises the errors of `fetch`, and SourceRefusedError if the hub does not name one.
    """
    content = bytearray()
    url = f"{origin.url}/api/models/{repository}/revision/{revision}"
    fetch(origin, url, content.extend, _MOST_INFO_BYTES, stall)
    try:
        found = orjson.loads(content)["sha"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not _COMMIT.fullmatch(found):
        raise SourceRefusedError(
            f"the hub {origin.name!r} names no commit for {repository}@{revision}; look at the "
            "origin"
        )
    return found


def fetch(
    origin: Origin, url: str, sink: Sink, limit: int, stall: float, *, etag: str | None = None
) -> None:
    """Give the file at `url` to `sink` in pieces, up to `limit` bytes.

    Follows redirects to the origin's host and those that it names. `stall` is how long, in seconds,
    the server may be silent, or behind 1 KiB per second. Raises BodyTooLargeError,
    SourceRefusedError for a missing file or a forbidden redirect, SourceUnreachableError, also for
    a file that does not have the `etag` any more.
    """
    started = time.monotonic()
    with _answered(origin, "GET", url, stall) as (name, response):
        if etag not in (None, response.headers.get("etag")):
            raise SourceUnreachableError(
                f"the origin {origin.name!r} replaced {name} during the pull; retry",
                origin=origin.name,
            )
        _read(origin, name, response, sink, limit, started + stall)


def etag_of(origin: Origin, url: str, stall: float) -> str:
    """Return the ETag of the file at `url`.

    Raises the errors of `fetch`, and SourceRefusedError if the server names none.
    """
    with _answered(origin, "HEAD", url, stall) as (name, response):
        found = response.headers.get("etag", "")
    if not found:
        raise SourceRefusedError(
            f"the origin {origin.name!r} has no ETag for {name}; look at the origin",
            origin=origin.name,
        )
    return str(found)


@contextmanager
def _answered(
    origin: Origin, method: str, url: str, stall: float
) -> Iterator[tuple[str, httpx.Response]]:
    """Give the name of the file at `url` and the response with it, whose body is still to come.

    Raises the errors of `fetch`.
    """
    target = httpx.URL(url)
    timeout = httpx.Timeout(stall, connect=_CONNECT_SECONDS)
    with _as_unreachable(origin), httpx.Client(trust_env=False, timeout=timeout) as client:
        for _ in range(_MOST_REDIRECTS + 1):
            request = _request(client, origin, method, target)
            with _deadline(client, stall):
                response = client.send(request, stream=True)
            try:
                if response.status_code not in _REDIRECTS:
                    name = target.path.rpartition("/")[2]
                    _check_status(origin, name, response.status_code)
                    yield name, response
                    return
                target = _next(origin, target, response.headers.get("location", ""))
            finally:
                response.close()
    raise SourceRefusedError(
        f"the origin {origin.name!r} redirects more than {_MOST_REDIRECTS} times; look at the "
        "origin"
    )


@contextmanager
def _as_unreachable(origin: Origin) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, OSError, RuntimeError) as error:
        # Without the text of the error, which may tell of what is inside the network.
        kind = type(error).__name__
        reason = "its host name does not resolve" if isinstance(error, socket.gaierror) else kind
        raise SourceUnreachableError(
            f"the origin {origin.name!r} cannot be read ({reason}); retry later, or ask the "
            "operator",
            origin=origin.name,
        ) from error


@contextmanager
def _deadline(client: httpx.Client, seconds: float) -> Iterator[None]:
    """Close the client's connections after a time, as its timeouts are those of single reads.

    A server that sends its head byte by byte would otherwise hold a thread for hours.
    """
    timer = threading.Timer(seconds + _CONNECT_SECONDS, client.close)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _request(client: httpx.Client, origin: Origin, method: str, target: httpx.URL) -> httpx.Request:
    """Return a request to the address of `target` that was checked."""
    address = _address(origin, target.host, target.port or _port(target))
    headers = {
        "Host": target.netloc.decode("ascii"),
        "Accept-Encoding": "identity",
        "User-Agent": "bonsai-lora",
    }
    own = httpx.URL(origin.url)
    if origin.token is not None and _site(target) == _site(own):
        headers["Authorization"] = f"Bearer {origin.token}"
    extensions: dict[str, Any] = {"sni_hostname": target.host}
    there = target.copy_with(host=str(address))
    return client.build_request(method, there, headers=headers, extensions=extensions)


def _port(url: httpx.URL) -> int:
    return 443 if url.scheme == "https" else 80


def _site(url: httpx.URL) -> tuple[str, str, int]:
    return url.scheme, url.host, url.port or _port(url)


def _address(origin: Origin, host: str, port: int) -> IPv4Address | IPv6Address:
    """Return an address of `host`; raises SourceRefusedError if one of them is not public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [ip_address(str(one[4][0]).partition("%")[0]) for one in found]
    if not origin.allow_private and not all(map(_is_public, addresses)):
        raise SourceRefusedError(
            f"the host of origin {origin.name!r} has an address that is not public; add "
            "allow_private to the sources file to allow that",
            origin=origin.name,
        )
    return addresses[0]


def _is_public(address: IPv4Address | IPv6Address) -> bool:
    if isinstance(address, IPv6Address) and (
        address.ipv4_mapped or address.sixtofour or address.teredo or address in _TRANSLATED
    ):
        return False
    return address.is_global and not address.is_multicast


def _next(origin: Origin, target: httpx.URL, location: str) -> httpx.URL:
    """Return where a redirect leads; raises SourceRefusedError unless the origin allows it."""
    there = target.join(location)
    is_own = _site(there) == _site(httpx.URL(origin.url))
    is_named = there.host in origin.hosts and there.scheme == "https" and _site(there)[2] == 443
    if there.userinfo or not (is_own or is_named):
        raise SourceRefusedError(
            f"the origin {origin.name!r} redirects to a host that it does not name; add it to "
            "hosts in the sources file to allow that",
            origin=origin.name,
        )
    return there


def _check_status(origin: Origin, name: str, status: int) -> None:
    if status in (401, 403, 404):
        raise SourceRefusedError(
            f"the origin {origin.name!r} has no {name} there, or not for this service (status "
            f"{status}); use the path of an adapter",
            origin=origin.name,
        )
    if status != 200:
        raise SourceUnreachableError(
            f"the origin {origin.name!r} answered with status {status}; retry later",
            origin=origin.name,
        )


def _read(
    origin: Origin, name: str, response: httpx.Response, sink: Sink, limit: int, until: float
) -> None:
    """Give the body of a response to `sink`; raises the errors of `fetch`."""
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise SourceRefusedError(
            f"the origin {origin.name!r} compresses {name}, although nobody asked for it; look "
            "at the origin",
            origin=origin.name,
        )
    declared = response.headers.get("content-length", "")
    check_length(name, int(declared) if declared.isdigit() else 0, limit)
    received = 0
    for piece in response.iter_raw():
        received += len(piece)
        check_length(name, received, limit)
        if time.monotonic() > until + received / _LEAST_BYTES_PER_SECOND:
            raise SourceUnreachableError(
                f"the origin {origin.name!r} sends less than {_LEAST_BYTES_PER_SECOND} bytes per "
                "second; retry later",
                origin=origin.name,
            )
        sink(piece)


def check_length(name: str, size: int, limit: int) -> None:
    """Raise BodyTooLargeError if the file `name` has more than `limit` bytes."""
    if size > limit:
        raise BodyTooLargeError(
            f"{name} has at least {size} bytes, but the limit is {limit}; pull a smaller adapter",
            got_bytes=size,
            limit_bytes=limit,
        )

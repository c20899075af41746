"""Refuse what a web page of a different site makes a browser send.

A page can send some requests to any address (the fetch standard calls them CORS-safelisted), and
with a host name that it lets resolve to this machine's address (DNS rebinding), it is of the same
site as the service. So a service without keys answers to known host names only, and writes come
from its own pages, or from those of an origin that the operator named.
"""

from collections.abc import Collection, Mapping
from ipaddress import ip_address

from bonsai_lora.errors import (
    CrossSiteError,
    MisdirectedRequestError,
    UnsupportedMediaTypeError,
)

ANY_HOST = "*"

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_SIMPLE_TYPES = frozenset(
    {b"", b"application/x-www-form-urlencoded", b"multipart/form-data", b"text/plain"}
)
"""Content types that a page can send without asking first (fetch standard, section 2.2.2)."""


def check_host(host: bytes, allowed: Collection[str]) -> None:
    """Raise MisdirectedRequestError unless `host` is localhost, an IP address or `allowed`.

    A request without a Host header comes from no browser.
    """
    name = host_name(host)
    if not host or name == "localhost" or ANY_HOST in allowed or name in allowed:
        return
    if not _is_address(name):
        shown = host.decode("latin-1")[:200]
        raise MisdirectedRequestError(
            f"the request is for the host {shown!r}, which this service does not answer to; use "
            "its address, or add the name to --allowed-hosts",
            got=shown,
        )


def host_name(host: bytes) -> str:
    """Return the name of a Host header in lower case, without its port."""
    text = host.decode("latin-1").lower()
    head, colon, port = text.rpartition(":")
    return head if colon and port.isdigit() else text


def _is_address(name: str) -> bool:
    try:
        ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True


def check_origin(
    method: str,
    path: str,
    headers: Mapping[bytes, bytes],
    host: bytes,
    origins: Collection[str],
) -> None:
    """Raise an error for a write from a web page that could be of a different site.

    `host` is the one that the page's browser called. Raises CrossSiteError for an Origin that is
    neither this host nor in `origins`, and
    UnsupportedMediaTypeError for a content type that a page need not ask first to send.
    """
    origin = headers.get(b"origin")
    if origin is None or method in _SAFE:
        return
    shown = origin.decode("latin-1")[:200]
    if shown not in origins and not _is_same(origin, host):
        raise CrossSiteError(
            f"the request comes from a page of {shown!r}, which is a different site; add it to "
            "--cors-origins if its pages may use this service",
            got=shown,
        )
    media = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    if (not media and has_body) or (media in _SIMPLE_TYPES and path.startswith("/v2/")):
        raise UnsupportedMediaTypeError(
            f"a web page sent Content-Type {media.decode('latin-1')[:100]!r}; set the header to "
            "the type of the body, such as application/json",
            got=media.decode("latin-1")[:100],
        )


def _is_same(origin: bytes, host: bytes) -> bool:
    """Return whether an origin is the host that the request is for."""
    return bool(host) and origin.partition(b"://")[2].lower() == host.lower()

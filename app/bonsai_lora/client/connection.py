"""Where the service is and what every request carries: the same for both clients."""

import os
from collections.abc import Mapping
from typing import Any

import httpx

from bonsai_lora.validation import check_credential, shown

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "BONSAI_LORA_URL"
TOKEN_VARIABLE = "BONSAI_LORA_TOKEN"  # noqa: S105 - the name of the variable

TIMEOUT = httpx.Timeout(60, read=600)
"""Seconds; a large merge may take minutes before its answer begins."""

LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=4)
"""Idle connections are closed before the service does it, after five seconds: a write that meets
the closing of its connection could not be repeated."""

RETRIES = 2


def url_of(url: str | None) -> str:
    """Return `url`, by default that of BONSAI_LORA_URL, else that of a service on this machine."""
    return url or os.environ.get(URL_VARIABLE) or DEFAULT_URL


def options_of(
    url: str | None,
    uds: str | os.PathLike[str] | None,
    token: str | None,
    headers: Mapping[str, str] | None,
    timeout: float | httpx.Timeout,
    transport: type[httpx.HTTPTransport | httpx.AsyncHTTPTransport],
) -> dict[str, Any]:
    """Return the arguments of `httpx.Client`; `transport` is the class for a Unix socket.

    Raises ValueError if both `url` and `uds` are given, the URL is not one of HTTP, or no header
    can carry the token, and httpx.InvalidURL.
    """
    if url is not None and uds is not None:
        raise ValueError("url and uds are both given; a service has one address")
    token = os.environ.get(TOKEN_VARIABLE) if token is None else token
    lines = dict(headers or {})
    if token:
        source = f"the token (by default {TOKEN_VARIABLE})"
        lines = {"Authorization": f"Bearer {check_credential(source, token)}", **lines}
    options = {"headers": lines, "timeout": timeout, "limits": LIMITS}
    if uds is None:
        address = url_of(url)
        if not address.startswith(("http://", "https://")):
            raise ValueError(
                f"{shown(address)} is not a valid URL; expected one such as {DEFAULT_URL}"
            )
        return {**options, "base_url": address}
    socket = transport(uds=os.fspath(uds), limits=LIMITS)
    return {**options, "base_url": "http://localhost", "transport": socket}

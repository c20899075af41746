"""Read objects of an S3-compatible bucket: obstore signs their URLs, and `web` fetches them.

obstore's own client would follow any redirect and connect to any address, so all that it sends
itself is a request for the machine's credentials, if the operator has named none.
"""

import hashlib
import logging
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, Literal
from urllib.parse import urlsplit

import obstore
from obstore import exceptions as failures
from obstore.store import S3Store

from bonsai_lora.errors import SourceRefusedError, SourceUnreachableError
from bonsai_lora.sources import web
from bonsai_lora.sources.origins import Origin, Reference
from bonsai_lora.sources.web import Sink

_log = logging.getLogger(__name__)

_SIGNED_FOR = timedelta(seconds=60)
"""How long a request may take to arrive; the answer may take longer."""
_CLIENT: Any = {"connect_timeout": "3s", "timeout": "5s"}
_RETRY: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=5)}
_REVISION_DIGITS = 40


def pin(found: Reference, files: tuple[str, ...], stall: float) -> Reference:
    """Return the reference with the ETags of `files`, and the revision that stands for them.

    Raises SourceRefusedError if that is not the revision that `found` asks for, and the errors of
    `web.etag_of`.
    """
    etags = {name: web.etag_of(*_signed("HEAD", found, name), stall) for name in files}
    listed = "".join(f"{name} {etag}\n" for name, etag in etags.items())
    revision = hashlib.sha256(listed.encode()).hexdigest()[:_REVISION_DIGITS]
    if found.revision not in (None, revision):
        raise SourceRefusedError(
            f"the source is {found.at(revision)} now, and the bucket keeps no other revision; pull "
            "that, or leave the revision out",
            origin=found.origin.name,
        )
    return replace(found, revision=revision, etags=etags)


def read(pinned: Reference, file: str, sink: Sink, limit: int, stall: float) -> None:
    """Give a file to `sink` in pieces, up to `limit` bytes; raises the errors of `web.fetch`."""
    origin, url = _signed("GET", pinned, file)
    web.fetch(origin, url, sink, limit, stall, etag=pinned.etags[file])


def _signed(method: Literal["GET", "HEAD"], found: Reference, file: str) -> tuple[Origin, str]:
    """Return the origin at the address of the bucket, and the URL of a file for one request."""
    origin = found.origin
    try:
        url = obstore.sign(_bucket(origin), method, f"{found.path}/{file}", _SIGNED_FOR)
    except failures.BaseError as error:
        # Not for callers: it names addresses.
        _log.warning("no URL of origin %r: %s", origin.name, str(error).partition("\n")[0])
        raise SourceUnreachableError(
            f"the service has no credentials for the origin {origin.name!r}; ask the operator",
            origin=origin.name,
        ) from error
    parts = urlsplit(url)
    if parts.scheme != "https" and not origin.allow_http:
        raise SourceRefusedError(
            f"the endpoint of origin {origin.name!r} is not HTTPS; add allow_http to the sources "
            "file to allow that",
            origin=origin.name,
        )
    return replace(origin, url=f"{parts.scheme}://{parts.netloc}"), url


@cache
def _bucket(origin: Origin) -> S3Store:
    """Return what signs for an origin; it keeps the machine's credentials while they are valid."""
    bucket, _, prefix = origin.url.removeprefix("s3://").partition("/")
    options: Any = {"endpoint": origin.endpoint, "region": origin.region}
    if origin.credentials is not None:
        options["access_key_id"], options["secret_access_key"] = origin.credentials
    return S3Store(
        bucket,
        prefix=prefix or None,
        client_options=_CLIENT,
        retry_config=_RETRY,
        **{name: value for name, value in options.items() if value},
    )

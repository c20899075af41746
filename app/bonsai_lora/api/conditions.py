"""Conditional requests: If-Match and If-None-Match (RFC 9110, section 13)."""

from fastapi import Request

from bonsai_lora.api.body import header_of
from bonsai_lora.errors import PreconditionFailedError
from bonsai_lora.service.sets import Precondition
from bonsai_lora.storage.setfile import SetRecord


def precondition(request: Request) -> Precondition:
    """Return a function that checks the request's conditions before a change."""
    if_match = header_of(request, "if-match")
    if_none_match = header_of(request, "if-none-match")

    def check(present: SetRecord | None) -> None:
        etag = present.etag if present else None
        if if_match is not None and not _matches(if_match, etag, weak=False):
            raise PreconditionFailedError(
                f"If-Match is {if_match[:200]}, but "
                + (
                    f"the set's ETag is {etag}; fetch the set and repeat the change"
                    if etag
                    else "the set does not exist; create it without If-Match"
                ),
                got=if_match[:200],
                expected=etag,
            )
        if if_none_match is not None and _matches(if_none_match, etag, weak=True):
            raise PreconditionFailedError(
                f"If-None-Match is {if_none_match[:200]}, but the set exists with ETag {etag}; "
                f"send If-Match: {etag} to replace it",
                got=if_none_match[:200],
                expected=etag,
            )

    return check


def not_modified(request: Request, etag: str) -> bool:
    """Return whether If-None-Match names `etag`, so that the response is 304."""
    if_none_match = header_of(request, "if-none-match")
    return if_none_match is not None and _matches(if_none_match, etag, weak=True)


def _matches(header: str, etag: str | None, *, weak: bool) -> bool:
    if etag is None:
        return False
    if header.strip() == "*":
        return True
    tags = [tag.strip() for tag in header.split(",")]
    if weak:
        tags = [tag.removeprefix("W/") for tag in tags]
    return etag in tags

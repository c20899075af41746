"""Read request bodies: length-limited, checked against Content-Type, with as few copies."""

from collections.abc import AsyncIterator, Collection
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from bonsai_lora.api.errors import validation_problem
from bonsai_lora.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    MalformedBodyError,
    UnsupportedMediaTypeError,
    counted,
)
from bonsai_lora.service.work import Place
from bonsai_lora.wire.media import Form, parse_content_type

Model = TypeVar("Model", bound=BaseModel)


LONG_BYTES = 1 << 16
"""Bodies up to this length take a place when they are complete, longer ones before that.
Their memory, and that of responses up to this length, is bounded by the number of places."""

MODEL_BYTES = 1 << 20
"""Longest body parsed into a pydantic model; models hold names and sizes, not tensors."""

_MOST_COLONS, _MOST_COMMAS = 4096, 16384
"""Most fields of a model's JSON, and most values in its lists. Pydantic reports each that is wrong,
and lets no thread run until it has reported all."""

_LENGTH_DIGITS = 18
"""Most digits of a Content-Length."""


async def read_body(request: Request, limit: int, place: Place | None = None) -> bytes:
    """Return the body; raises BodyTooLargeError if it is longer than `limit` bytes.

    Takes `place` when the body is whole, or more than LONG_BYTES have come; raises BusyError.
    """
    declared = content_length(request)
    if declared is not None:
        check_length(declared, limit)
    # The last part is empty; a single one is not copied.
    parts = [part async for part in body_parts(request, limit, place) if part]
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def body_parts(
    request: Request, limit: float, place: Place | None = None
) -> AsyncIterator[bytes]:
    """Yield the body as it arrives; raises and takes `place` as `read_body` does."""
    received = 0
    async for part in request.stream():
        received += len(part)
        check_length(received, limit)
        if place is not None and received > LONG_BYTES:
            place.take()
        yield part
    if place is not None:
        place.take()


async def read_model(request: Request, model: type[Model], place: Place) -> Model:
    """Return the JSON body as a validated `model`, with a `place` as in `read_body`.

    Raises UnsupportedMediaTypeError, BodyTooLargeError, MalformedJsonError, InvalidRequestError,
    BusyError.
    """
    body_form(request, (Form.JSON,))
    body = await read_body(request, MODEL_BYTES, place)
    return parse_model(body, model)


def parse_model(body: bytes, model: type[Model]) -> Model:
    """Return JSON text as a validated `model`; raises MalformedJsonError, InvalidRequestError."""
    count = body.count(b":")
    if count > _MOST_COLONS:
        raise InvalidRequestError(
            f"the body has {count} fields, but the limit is {_MOST_COLONS}; send only the fields "
            "that this call has",
            got=count,
            limit=_MOST_COLONS,
        )
    count = body.count(b",")
    if count > _MOST_COMMAS:
        raise InvalidRequestError(
            f"the body has {count} commas, but the limit is {_MOST_COMMAS}; send shorter lists",
            got=count,
            limit=_MOST_COMMAS,
        )
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise validation_problem(error.errors(include_url=False)) from None


def body_form(request: Request, accepted: Collection[Form]) -> Form:
    """Return the form of the body.

    Raises UnsupportedMediaTypeError for a form not in `accepted`, or a compressed body.
    """
    check_not_compressed(request)
    return parse_content_type(request.headers.get("content-type"), accepted)


def header_of(request: Request, name: str) -> str | None:
    """Return all values of a header, joined with commas; None if it is missing."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None


def media_type(request: Request, default: str = "") -> str:
    """Return the media type that Content-Type names, in lower case and without parameters."""
    return request.headers.get("content-type", default).partition(";")[0].strip().lower()


def check_media_type(request: Request, expected: str, what: str) -> None:
    """Raise UnsupportedMediaTypeError unless the body, called `what`, is of this type alone."""
    check_not_compressed(request)
    if media_type(request) != expected:
        header = request.headers.get("content-type", "")
        raise UnsupportedMediaTypeError(
            f"Content-Type is {header[:100]!r}; send {what} as {expected}",
            got=header[:100],
            expected=[expected],
        )


def check_not_compressed(request: Request) -> None:
    """Raise UnsupportedMediaTypeError if the body is compressed."""
    check_coding(header_of(request, "content-encoding"))


def check_coding(coding: str | None) -> None:
    """Raise UnsupportedMediaTypeError if Content-Encoding names a compression."""
    if coding is not None and coding.strip().lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"Content-Encoding {coding[:100]!r} is not supported here; send the body uncompressed",
            got=coding[:100],
            expected=["identity"],
        )


def content_length(request: Request) -> int | None:
    """Return the value of Content-Length; None if the header is missing."""
    declared = request.headers.get("content-length")
    return None if declared is None else parse_length(declared.encode("latin-1"))


def parse_length(declared: bytes) -> int:
    """Return the value of a Content-Length: 0 if it is not a number, 10**18 if over 18 digits."""
    digits = declared.strip(b" \t").lstrip(b"0")
    if len(digits) > _LENGTH_DIGITS:
        return int(10**_LENGTH_DIGITS)
    return int(digits) if digits.isdigit() else 0


def check_length(length: int, limit: float) -> None:
    """Raise BodyTooLargeError if `length` is over `limit` bytes."""
    if length > limit:
        raise BodyTooLargeError(
            f"the body has at least {counted(length, 'byte')}, but the limit is {limit}; send "
            "less per request, send tensors as safetensors, or raise the limit (see serve --help)",
            got_bytes=length,
            limit_bytes=limit,
        )


class BodyReader:
    """Reads a streamed body in chunks of an exact size."""

    def __init__(self, request: Request) -> None:
        self._parts: AsyncIterator[bytes] = request.stream()
        self._rest = memoryview(b"")

    async def read_exactly(self, size: int) -> bytearray:
        """Return the next `size` bytes; raises MalformedBodyError if the body ends early."""
        block = bytearray(size)
        view = memoryview(block)
        filled = 0
        while filled < size:
            if not self._rest:
                await self._next_part(size - filled)
            piece = self._rest[: size - filled]
            view[filled : filled + len(piece)] = piece
            self._rest = self._rest[len(piece) :]
            filled += len(piece)
        return block

    async def expect_end(self) -> None:
        """Raise InvalidRequestError unless the body ends here."""
        while not self._rest:
            try:
                self._rest = memoryview(await anext(self._parts))
            except StopAsyncIteration:
                return
        raise InvalidRequestError(
            "the body has bytes after the weights; send nothing after the last weight"
        )

    async def _next_part(self, missing: int) -> None:
        try:
            self._rest = memoryview(await anext(self._parts))
        except StopAsyncIteration:
            raise MalformedBodyError(
                f"the body ended {counted(missing, 'byte')} before the end of a block of weights; "
                "send all weights"
            ) from None

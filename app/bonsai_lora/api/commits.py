"""Commits to the hub: NDJSON whose files are base64, decoded to disk as they arrive.

The format is what huggingface_hub 2.4 sends (`_commit_api._prepare_commit_payload`): a line
`header`, then one line per file, with its content before its path.
"""

import binascii
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request

from bonsai_lora.api.body import (
    MODEL_BYTES,
    body_parts,
    check_length,
    check_media_type,
    content_length,
)
from bonsai_lora.api.uploads import write_weights
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.names import is_sha256
from bonsai_lora.formats.peft_config import CONFIG_BYTES, CONFIG_FILE, MODEL_FILE
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.work import Place
from bonsai_lora.storage.upload import Upload

_MEDIA_TYPE = "application/x-ndjson"
_MOST_LINES = 1024
_CONTENT = re.compile(rb'(?<!\\)"content"\s*:\s*"')
"""What is before the characters of a file. Within a JSON string its quotes would be escaped."""
_HELD_BYTES = 2 * CONFIG_BYTES
"""Longer files must be the weights, and are written before their path is known."""
_TAIL_BYTES = 64
"""Longest match of _CONTENT to look for."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What a commit says, but for the weights, which are written to the upload."""

    config: bytes | None
    """Content of adapter_config.json; None if neither file is in the commit."""
    parent: str | None
    """The commit that the client wants to replace; None for any."""
    pointer: tuple[str, int] | None
    """SHA-256 and size of weights that were uploaded before, in place of those in the commit."""


async def receive_commit(
    request: Request, upload: Upload, limit: int, reserved: Reservation, place: Place
) -> Commit:
    """Write adapter_model.safetensors to `upload`; return the rest of the commit.

    `reserved` counts bytes before they are written, and `place` is taken as in `read_body`. Raises
    their errors, BodyTooLargeError if the files have more than `limit` bytes, MalformedBodyError,
    InvalidRequestError for an operation other than adding both files once, and the errors of
    `write_weights`.
    """
    check_media_type(request, _MEDIA_TYPE, "a commit")
    declared = _decoded(content_length(request) or 0)
    check_length(declared, limit)
    reserved.budget.check(declared)
    return await _CommitReader(_chunks(request, reserved, place), upload, limit).read()


async def _chunks(request: Request, reserved: Reservation, place: Place) -> AsyncIterator[bytes]:
    async for chunk in body_parts(request, math.inf, place):
        reserved.add(_decoded(len(chunk)))
        yield chunk


def _decoded(length: int) -> int:
    """Return how many bytes base64 of this length has at most."""
    return length * 3 // 4


class _Base64:
    """Decodes base64 (RFC 4648, section 4) that arrives in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._ended = False

    def feed(self, piece: bytes) -> bytes:
        """Return what the groups of four characters that are complete by now stand for."""
        text = self._rest + piece
        whole = len(text) // 4 * 4
        self._rest = text[whole:]
        if not whole:
            return b""
        if self._ended:
            raise MalformedBodyError("base64 goes on after its padding; encode each file once")
        self._ended = text[whole - 1] == ord("=")
        try:
            return binascii.a2b_base64(text[:whole], strict_mode=True)
        except binascii.Error as error:
            raise MalformedBodyError(
                f"the content of a file is not base64: {error}; encode it as RFC 4648 says"
            ) from None

    def end(self) -> None:
        """Raise MalformedBodyError unless all characters have been decoded."""
        if self._rest:
            raise MalformedBodyError(
                f"base64 ends {len(self._rest)} characters after a group of four; pad it with '='"
            )


@dataclass
class _CommitReader:
    """Reads the lines of a commit, and the files in them."""

    chunks: AsyncIterator[bytes]
    upload: Upload
    limit: int
    _chunk: bytes = b""
    _at: int = 0
    """How much of the chunk has been read."""
    _lines: int = 0
    _text_size: int = 0
    """Bytes of all lines without the contents of their files."""
    _size: int = 0
    """Bytes of all files."""
    _has_content: bool = False
    """Whether the present line has a file's content."""
    _file: bytearray = field(default_factory=bytearray)
    """What of that content is still to be written or kept."""
    _is_model: bool = False
    """Whether some of it is written already."""
    _config: bytes | None = None
    _has_model: bool = False
    _pointer: tuple[str, int] | None = None
    _parent: str | None = None

    async def read(self) -> Commit:
        """Read the whole body; raises InvalidRequestError if it has one file of the two."""
        while (line := await self._read_line()) is not None:
            self._lines += 1
            if self._lines > _MOST_LINES:
                raise InvalidRequestError(
                    f"the commit has more than {_MOST_LINES} lines; send the two adapter files "
                    "only",
                    limit=_MOST_LINES,
                )
            if text := line.strip():
                await self._run(*self._parsed(text))
        if (self._config is None) is self._has_model:
            missing = CONFIG_FILE if self._config is None else MODEL_FILE
            raise InvalidRequestError(
                f"the commit lacks {missing}; push both adapter files in one commit, such as by "
                "upload_folder",
                expected=[CONFIG_FILE, MODEL_FILE],
            )
        return Commit(self._config, self._parent, self._pointer)

    async def _read_line(self) -> bytearray | None:
        """Return the next line without the content of its file, which is read; None at the end."""
        line, searched = bytearray(), 0
        self._file = bytearray()
        self._has_content = self._is_model = False
        while await self._has_more():
            newline = self._chunk.find(b"\n", self._at)
            before, start = len(line), self._at
            line += self._chunk[start : None if newline < 0 else newline + 1]
            found = _CONTENT.search(line, max(searched, before - _TAIL_BYTES))
            if found is not None:
                del line[found.end() :]
            self._at = start + len(line) - before
            self._text_size += len(line) - before
            check_length(self._text_size, MODEL_BYTES)
            if found is not None:
                searched = len(line)
                await self._read_content()
            elif newline >= 0:
                return line
        return line or None

    async def _read_content(self) -> None:
        """Read a file's characters, up to the quote that ends them."""
        if self._has_content:
            raise MalformedBodyError(
                f"line {self._lines + 1} of the commit has two contents; send one per line"
            )
        self._has_content = True
        decoder = _Base64()
        while await self._has_more():
            quote = self._chunk.find(b'"', self._at)
            text = self._chunk[self._at : None if quote < 0 else quote]
            self._at += len(text)
            decoded = decoder.feed(text)
            self._size += len(decoded)
            check_length(self._size, self.limit)
            self._file += decoded
            if len(self._file) > _HELD_BYTES:
                self._is_model = True
                await self._write_model()
            if quote >= 0:
                decoder.end()
                return
        raise MalformedBodyError("the body ends within a file; send the whole commit")

    async def _has_more(self) -> bool:
        """Return whether the body goes on, and get its next chunk if the last one is read."""
        while self._at == len(self._chunk):
            try:
                self._chunk, self._at = await anext(self.chunks), 0
            except StopAsyncIteration:
                return False
        return True

    async def _write_model(self) -> None:
        if self._has_model:
            raise _twice(MODEL_FILE)
        piece, self._file = self._file, bytearray()
        await write_weights(self.upload, piece)

    def _parsed(self, line: bytearray) -> tuple[str, dict[str, Any]]:
        try:
            operation = orjson.loads(line)
            return str(operation["key"]), dict(operation["value"])
        except (ValueError, TypeError, KeyError):
            raise MalformedBodyError(
                f"line {self._lines} of the commit is not a JSON object with key and value; send "
                "one operation per line"
            ) from None

    async def _run(self, operation: str, value: dict[str, Any]) -> None:
        if operation == "header":
            parent = value.get("parentCommit")
            self._parent = None if parent is None else str(parent)
        elif operation == "file":
            await self._add(value)
        elif operation == "lfsFile":
            self._point(value)
        else:
            raise InvalidRequestError(
                f"the commit has the operation {operation[:40]!r}; a set takes whole adapters "
                f"only: add {CONFIG_FILE} and {MODEL_FILE}, or DELETE /v1/sets/{{set}}",
                got=operation[:40],
                expected=["file", "lfsFile"],
            )

    def _point(self, value: dict[str, Any]) -> None:
        """Take the weights to be those of a file that was uploaded before."""
        path, oid, size = str(value.get("path")), str(value.get("oid")), value.get("size")
        if path != MODEL_FILE or self._has_content:
            raise InvalidRequestError(
                f"the commit has {path[:100]!r} as lfsFile; send only {MODEL_FILE} so, without "
                f"content, and {CONFIG_FILE} as file",
                field="path",
            )
        if value.get("algo") != "sha256" or not is_sha256(oid):
            raise InvalidRequestError(
                f"the lfsFile {path} has the oid {oid[:100]!r}; send algo 'sha256', and the oid as "
                "64 lower-case hexadecimal digits",
                field="oid",
            )
        if type(size) is not int or size < 0:
            raise InvalidRequestError(
                f"the lfsFile {path} has the size {str(size)[:40]!r}; send its length in bytes",
                field="size",
            )
        if self._has_model:
            raise _twice(MODEL_FILE)
        self._size += size
        check_length(self._size, self.limit)
        self._has_model, self._pointer = True, (oid, size)

    async def _add(self, value: dict[str, Any]) -> None:
        path = str(value.get("path"))
        if value.get("encoding") != "base64" or not self._has_content:
            raise InvalidRequestError(
                f"the file {path[:100]!r} has the encoding {str(value.get('encoding'))[:40]!r} and "
                f"{'a' if self._has_content else 'no'} content; send its content in base64",
                field="encoding",
            )
        if path == MODEL_FILE:
            await self._write_model()
            self._has_model = True
        elif path == CONFIG_FILE:
            self._keep_config()
        else:
            raise InvalidRequestError(
                f"the commit has the file {path[:100]!r}; a set keeps {CONFIG_FILE} and "
                f"{MODEL_FILE} at the top of the repository, and nothing else",
                got=path[:100],
                expected=[CONFIG_FILE, MODEL_FILE],
            )

    def _keep_config(self) -> None:
        check_length(_HELD_BYTES if self._is_model else len(self._file), CONFIG_BYTES)
        if self._config is not None:
            raise _twice(CONFIG_FILE)
        check_config_start(self._file)
        self._config = bytes(self._file)


def _twice(path: str) -> InvalidRequestError:
    return InvalidRequestError(f"the commit has {path} twice; send it once", got=path)

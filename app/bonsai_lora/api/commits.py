"""Commits to the hub: NDJSON whose files are base64, decoded to disk as they arrive.

The format is what huggingface_hub 2.4 sends (`_commit_api._prepare_commit_payload`): a line
`header`, then one line per file, with its content before its path.
"""

import binascii
import re
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi import Request

from bonsai_lora.api.body import (
    LONG_BYTES,
    MODEL_BYTES,
    check_length,
    check_media_type,
    content_length,
)
from bonsai_lora.api.uploads import WRITE_BYTES, write_weights
from bonsai_lora.errors import InvalidRequestError, MalformedBodyError
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import CONFIG_BYTES, CONFIG_FILE, MODEL_FILE
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.work import Place
from bonsai_lora.storage.staging import is_sha256
from bonsai_lora.storage.upload import Upload

_MEDIA_TYPE = "application/x-ndjson"
_MOST_LINES = 1024
_CONTENT = re.compile(rb'(?<!\\)"content"\s*:\s*"')
"""What is before the characters of a file. Within a JSON string its quotes would be escaped."""
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
    reader = _CommitReader(limit)
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        reserved.add(_decoded(len(chunk)))
        if received > LONG_BYTES:
            place.take()
        reader.feed(chunk)
        if len(reader.model) >= WRITE_BYTES:
            await write_weights(upload, reader.take_model())
    place.take()
    reader.end()
    await write_weights(upload, reader.take_model())
    return reader.commit()


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
    """Finds the lines of a commit and the files in them."""

    limit: int
    model: bytearray = field(default_factory=bytearray)
    """Weights that are decoded and still to be written."""
    _line: bytearray = field(default_factory=bytearray)
    """The current line without the content of its file."""
    _file: bytearray = field(default_factory=bytearray)
    """The content of its file, as long as it may be the configuration."""
    _base64: _Base64 | None = None
    """The decoder while a file's content arrives."""
    _searched: int = 0
    """Bytes of the line that are known to be before the next content."""
    _has_content: bool = False
    _is_model: bool = False
    """Whether the file is too long for a configuration."""
    _config: bytes | None = None
    _has_model: bool = False
    _pointer: tuple[str, int] | None = None
    _parent: str | None = None
    _lines: int = 0
    _text_size: int = 0
    _size: int = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        start = 0
        while start < len(chunk):
            take = self._take_text if self._base64 is None else self._take_content
            start = take(chunk, start)

    def _take_text(self, chunk: bytes, start: int) -> int:
        """Take what is not content, up to where it begins or the line ends; return its end."""
        newline = chunk.find(b"\n", start)
        stop = len(chunk) if newline < 0 else newline + 1
        self._text_size += stop - start
        check_length(self._text_size, MODEL_BYTES)
        search_from = max(self._searched, len(self._line) - _TAIL_BYTES)
        self._line += chunk[start:stop]
        found = _CONTENT.search(self._line, search_from)
        if found is not None:
            stop -= len(self._line) - found.end()
            self._begin_content(found.end())
        elif newline >= 0:
            self._end_line()
        return stop

    def _begin_content(self, end: int) -> None:
        if self._has_content:
            raise MalformedBodyError(
                f"line {self._lines + 1} of the commit has two contents; send one per line"
            )
        del self._line[end:]
        self._searched = end
        self._has_content, self._base64 = True, _Base64()

    def _take_content(self, chunk: bytes, start: int) -> int:
        """Take a file's characters, up to the quote that ends them; return their end."""
        assert self._base64 is not None
        quote = chunk.find(b'"', start)
        stop = len(chunk) if quote < 0 else quote
        decoded = self._base64.feed(chunk[start:stop])
        self._size += len(decoded)
        check_length(self._size, self.limit)
        self._file += decoded
        if len(self._file) > CONFIG_BYTES:
            self._is_model = True
            self._move_to_model()
        if quote >= 0:
            self._base64.end()
            self._base64 = None
        return stop

    def _move_to_model(self) -> None:
        if self._has_model:
            raise _twice(MODEL_FILE)
        self.model += self._file
        self._file = bytearray()

    def _end_line(self) -> None:
        self._lines += 1
        if self._lines > _MOST_LINES:
            raise InvalidRequestError(
                f"the commit has more than {_MOST_LINES} lines; send the two adapter files only",
                limit=_MOST_LINES,
            )
        line, self._line = self._line.strip(), bytearray()
        if line:
            self._run(*self._parsed(line))
        self._file, self._searched = bytearray(), 0
        self._has_content = self._is_model = False

    def _parsed(self, line: bytearray) -> tuple[str, dict[str, Any]]:
        try:
            operation = orjson.loads(line)
            return str(operation["key"]), dict(operation["value"])
        except (ValueError, TypeError, KeyError):
            raise MalformedBodyError(
                f"line {self._lines} of the commit is not a JSON object with key and value; send "
                "one operation per line"
            ) from None

    def _run(self, operation: str, value: dict[str, Any]) -> None:
        if operation == "header":
            parent = value.get("parentCommit")
            self._parent = None if parent is None else str(parent)
        elif operation == "file":
            self._add(value)
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

    def _add(self, value: dict[str, Any]) -> None:
        path = str(value.get("path"))
        if value.get("encoding") != "base64" or not self._has_content:
            raise InvalidRequestError(
                f"the file {path[:100]!r} has the encoding {str(value.get('encoding'))[:40]!r} and "
                f"{'a' if self._has_content else 'no'} content; send its content in base64",
                field="encoding",
            )
        if path == MODEL_FILE:
            self._move_to_model()
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
        if self._is_model:
            check_length(CONFIG_BYTES + 1, CONFIG_BYTES)
        if self._config is not None:
            raise _twice(CONFIG_FILE)
        check_config_start(self._file)
        self._config = bytes(self._file)

    def take_model(self) -> bytearray:
        """Return the weights that are still to be written, and forget them."""
        model, self.model = self.model, bytearray()
        return model

    def end(self) -> None:
        """Take the end of the body; raises MalformedBodyError within a file's content."""
        if self._base64 is not None:
            raise MalformedBodyError("the body ends within a file; send the whole commit")
        if self._line:
            self._end_line()

    def commit(self) -> Commit:
        """Return the commit; raises InvalidRequestError if it has one file of the two."""
        if (self._config is None) is self._has_model:
            missing = CONFIG_FILE if self._config is None else MODEL_FILE
            raise InvalidRequestError(
                f"the commit lacks {missing}; push both adapter files in one commit, such as by "
                "upload_folder",
                expected=[CONFIG_FILE, MODEL_FILE],
            )
        return Commit(self._config, self._parent, self._pointer)


def _twice(path: str) -> InvalidRequestError:
    return InvalidRequestError(f"the commit has {path} twice; send it once", got=path)

"""Parse long lists in JSON text piece by piece, so that other threads run in between.

orjson lets none run before it is done, which takes 0.2 s for a list of eight million numbers.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bonsai_lora.errors import BonsaiLoraError, InvalidRequestError, MalformedJsonError
from bonsai_lora.wire.buffers import Buffer

_LONG_BYTES = 1 << 16
"""Shorter lists are parsed at once."""
_MOST_ODD_BYTES = 1 << 22
"""Longest stretch without strings and objects that is not such a list; it is parsed at once."""
_PIECE_BYTES = 1 << 15
_BLOCK_BYTES = 1 << 16
_IS_MARK = np.isin(np.arange(256), list(b'"{}'))
"""Characters that lists of numbers, or of lists of numbers, do not have."""
_AFTER_NUMBER, _AFTER_LIST = re.compile(rb","), re.compile(rb"\][ \t\n\r]*,")
_NESTED = re.compile(rb"[ \t\n\r]*\[")
_DEEP = re.compile(rb"\[[ \t\n\r]*\[[ \t\n\r]*\[")

Parse = Callable[[bytes], Any]
LongList = tuple[int, int, list[Any]]
"""Where the text of a list begins and ends, and the list."""


def find_long_lists(text: Buffer, parse: Parse) -> list[LongList]:
    """Return long lists without strings and objects; others, and invalid ones, may be left out.

    `parse` returns the value of JSON text, and raises ValueError if it is none. If too much is left
    out, raises InvalidRequestError for lists of anything else, MalformedJsonError for no list.
    """
    found = []
    for start, end in _stretches(text):
        content = bytes(text[start:end])
        first, last = content.find(b"["), content.rfind(b"]") + 1
        if b"," not in content:  # white space, or no JSON: neither takes a parser long
            continue
        try:
            pieces = _pieces(content, first + 1, last - 1)
            values = [one for piece in pieces for one in parse(piece)]
        except (ValueError, RecursionError):
            if len(content) > _MOST_ODD_BYTES:
                raise _refusal(content, start, bytes(text[end : end + 1])) from None
        else:
            found.append((start + first, start + last, values))
    return found


def _refusal(content: bytes, start: int, following: bytes) -> BonsaiLoraError:
    where = f"{len(content)} characters from character {start} on"
    is_open = content.count(b"[") > content.count(b"]")
    has_others = content.lstrip().startswith(b",") or (is_open and following in (b'"', b"{"))
    if has_others or _DEEP.search(content):
        return InvalidRequestError(
            f"the JSON has {where} in lists of more than numbers, or of lists of numbers; send one "
            "vector, or a list of vectors"
        )
    return MalformedJsonError(
        f"the body is not JSON: {where} are not a list of numbers, nor a list of such lists; "
        "correct them, or send safetensors"
    )


def _stretches(text: Buffer) -> Iterator[tuple[int, int]]:
    """Yield where long stretches without quotes and braces begin and end."""
    codes = np.frombuffer(text, np.uint8)
    blocks = range(0, len(codes), _BLOCK_BYTES)
    marks = [at + np.flatnonzero(_IS_MARK[codes[at : at + _BLOCK_BYTES]]) for at in blocks]
    bounds = np.concatenate([[-1], *marks, [len(codes)]])
    for place in np.flatnonzero(np.diff(bounds) > _LONG_BYTES):
        yield int(bounds[place]) + 1, int(bounds[place + 1])


def _pieces(content: bytes, start: int, end: int) -> Iterator[bytes]:
    """Yield the elements of a list, whose text is `content` from `start` to `end`, as short lists.

    If each is JSON, so is the whole. Raises ValueError without a list, or if it ends with a comma.
    """
    if start == 0 or end < start:
        raise ValueError("there is no list")
    boundary = _AFTER_LIST if _NESTED.match(content, start) else _AFTER_NUMBER
    while match := boundary.search(content, start + _PIECE_BYTES, end):
        yield b"[%b]" % content[start : match.end() - 1]
        start = match.end()
    if not content[start:end].strip(b" \t\n\r"):
        raise ValueError("a comma is followed by nothing")
    yield b"[%b]" % content[start:end]

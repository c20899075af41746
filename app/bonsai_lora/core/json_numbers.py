"""Lists of numbers in JSON to float32 arrays and back, by `bonsai_lora.kernels`."""

from typing import NamedTuple

import numpy as np

from bonsai_lora.core.cast import FLOAT32, Floats, address_of
from bonsai_lora.kernels.library import kernels
from bonsai_lora.kernels.read_json import FOUND
from bonsai_lora.kernels.write_json import text_bytes


class NumberList(NamedTuple):
    """A list of numbers, or of lists of as many numbers each, in a text."""

    start: int
    end: int
    numbers: Floats
    """(n,) or (rows, n)"""


def prepare() -> None:
    """Have the machine code made, which takes 0.2 s."""
    kernels().read_json()
    kernels().write_json()


def find_lists(text: bytes | memoryview, least: int) -> list[NumberList]:
    """Return the lists of at least so many numbers, as they follow each other in JSON text.

    One may stand in a string: what is around them is not looked at. A list is left out where one of
    its numbers has digits that make 2^64 or so, is whole and from 2^53 on, or its last digit stands
    for less than 1e-300 or more than 1e38. Numbers beyond float32 become infinite.
    """
    find = kernels().read_json()
    characters = np.frombuffer(text, np.uint8)
    # A number takes two characters at least.
    room = np.empty(len(characters) // 2, FLOAT32)
    table = np.empty(FOUND, np.int64)
    lists: list[NumberList] = []
    at, used = 0, 0
    while find(
        address_of(characters),
        len(characters),
        at,
        least,
        address_of(room) + 4 * used,
        address_of(table),
    ):
        start, at, rows, columns = table.tolist()
        numbers = room[used : used + max(1, rows) * columns]
        used += len(numbers)
        lists.append(NumberList(start, at, numbers.reshape(rows, columns) if rows else numbers))
    return lists


def list_of(array: Floats) -> memoryview:
    """Return a float32 array (n,) or (rows, n) as a JSON list; all must be finite.

    Each number is the shortest decimal that reads back the same, with an exponent below 1e-5 and
    from 1e8 on.
    """
    array = np.ascontiguousarray(array)
    if array.dtype != FLOAT32 or array.ndim not in (1, 2):
        raise ValueError(f"expected float32 (n,) or (rows, n); got {array.dtype} {array.shape}")
    rows, columns = (1, *array.shape)[-2:]
    room = np.empty(2 + text_bytes(rows, columns), np.uint8)
    size = kernels().write_json()(address_of(array), rows, columns, address_of(room) + 1)
    if array.ndim == 1:
        return room[1 : 1 + size].data
    text = room[: 2 + size].data
    text[0], text[-1] = ord("["), ord("]")
    return text

"""Resume coroutines whose first step was run by hand: most finish in it and need no task."""

import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar, cast

T = TypeVar("T")
Awaited = Generator[Any, Any, T] | Coroutine[Any, Any, T]


@types.coroutine
def resume(iterator: Awaited[T], yielded: Any) -> Generator[Any, Any, T]:
    """Resume an awaitable that has already yielded once, as `yield from` would (PEP 380)."""
    try:
        while True:
            try:
                sent = yield yielded
            except BaseException as error:  # noqa: BLE001 - thrown into the awaitable
                yielded = iterator.throw(error)
            else:
                yielded = iterator.send(sent)
    except StopIteration as done:
        return cast("T", done.value)

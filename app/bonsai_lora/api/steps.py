"""Coroutines whose first step is taken by hand: most need no second one, and so no task."""

import types
from collections.abc import Coroutine, Generator
from typing import Any, TypeVar, cast

T = TypeVar("T")
Steps = Generator[Any, Any, T] | Coroutine[Any, Any, T]


@types.coroutine
def go_on(iterator: Steps[T], yielded: Any) -> Generator[Any, Any, T]:
    """Go on with an awaitable that has yielded once already, as `yield from` would (PEP 380)."""
    try:
        while True:
            try:
                got = yield yielded
            except BaseException as error:  # noqa: BLE001 - all are the awaitable's
                yielded = iterator.throw(error)
            else:
                yielded = iterator.send(got)
    except StopIteration as done:
        return cast("T", done.value)

"""Repeat a change of a set that a different process has changed meanwhile."""

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from bonsai_lora.errors import BusyError, ChangedMeanwhileError

P = ParamSpec("P")
T = TypeVar("T")

_TRIES = 5
_PAUSE_SECONDS = 0.05


def repeated(change: Callable[P, T]) -> Callable[P, T]:
    """Return `change`, called again from the start after ChangedMeanwhileError, five times in all.

    So preconditions are checked against the new version, and nothing of it is lost. After that,
    the call raises BusyError.
    """

    @wraps(change)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for number in range(_TRIES):
            try:
                return change(*args, **kwargs)
            except ChangedMeanwhileError:
                time.sleep(random.uniform(0, _PAUSE_SECONDS * 2**number))  # noqa: S311
        raise BusyError(
            "the set or the sums of the store kept changing meanwhile; retry in a second"
        )

    return call

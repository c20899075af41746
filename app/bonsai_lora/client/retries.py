"""Whether a call is sent again, and after how long."""

from typing import Any

import httpx

from bonsai_lora.client.call import Call
from bonsai_lora.errors import BonsaiLoraError, BusyError, NewerFormatError, RateLimitedError

_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 60
"""A service that asks for a longer wait gets no second attempt."""
_MOST_DIGITS = 9
_PASSING = (httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.TOO_MANY_REQUESTS)


class Retries:
    """The attempts of one call.

    A call is repeated if no byte of it was sent (the connection was refused), or if it changes
    nothing. A write is repeated only if the service said that it did not begin.
    """

    def __init__(self, call: Call[Any], most: int) -> None:
        self._call = call
        self._left = most
        self._wait = _FIRST_WAIT_SECONDS

    def after_failure(self, error: httpx.TransportError) -> float:
        """Return the seconds to wait after a broken connection; raise `error` to give up."""
        is_unsent = isinstance(error, httpx.ConnectError)
        is_broken = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
        if not is_unsent and not (is_broken and self._call.is_safe and not self._call.is_one_shot):
            raise error
        return self._next(error, self._wait)

    def after_refusal(self, error: BonsaiLoraError, answer: httpx.Response) -> float:
        """Return the seconds to wait, as Retry-After says; raise `error` to give up."""
        seconds = _wait_of(answer)
        did_not_begin = error.code in (BusyError.code, RateLimitedError.code)
        if (
            seconds is None
            or isinstance(error, NewerFormatError)  # no wait changes that
            or not (self._call.is_safe or did_not_begin)
            or self._call.is_one_shot
        ):
            raise error
        return self._next(error, seconds)

    def _next(self, error: Exception, seconds: float) -> float:
        if self._left <= 0:
            raise error
        self._left -= 1
        self._wait *= 2
        return seconds


def _wait_of(answer: httpx.Response) -> float | None:
    """Return the seconds that an answer asks to wait; None for none, or for too many."""
    text = answer.headers.get("retry-after", "")
    if answer.status_code not in _PASSING:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        return None
    return float(text) if int(text) <= _LONGEST_WAIT_SECONDS else None

"""Refuse unknown query parameters, since a misspelled one would be ignored silently."""

import re
from collections.abc import Iterable, Sequence
from typing import Annotated

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from pydantic import BeforeValidator, Field

from bonsai_lora.errors import InvalidRequestError, one_of
from bonsai_lora.wire.stacks import MAX_SCALE

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\Z")


def plain_number(text: str) -> str:
    """Return `text`; raises ValueError unless it is a decimal number.

    Python reads more, such as 1_0 and the digits of other scripts, which clients send by mistake.
    """
    if _NUMBER.match(text) is None:
        raise ValueError("expected a number")
    return text


DECIMAL = BeforeValidator(plain_number)
FiniteNumber = Annotated[float, Field(allow_inf_nan=False), DECIMAL]
"""A float in a query."""
Factor = Annotated[float, Field(ge=-MAX_SCALE, le=MAX_SCALE), DECIMAL]
"""A factor of a delta in a query."""
Count = Annotated[int, Field(ge=0, le=2**63 - 1), DECIMAL]
"""A size in a query."""


async def refuse_unknown_query(request: Request) -> None:
    """Raise InvalidRequestError for the first query parameter that is unknown to the route."""
    if not request.scope["query_string"]:
        return
    route: APIRoute = request.scope["route"]
    check_known(request.query_params.keys(), _known(route.dependant))


def _known(dependant: Dependant) -> list[str]:
    """Return the query parameters of a route and of its dependencies."""
    inner = [name for one in dependant.dependencies for name in _known(one)]
    return [one.alias for one in dependant.query_params] + inner


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InvalidRequestError for the first name in `given` that is not in `known`."""
    for name in given:
        if name not in known:
            expected = f"expected {one_of(known)}" if known else "remove it"
            raise InvalidRequestError(
                f"unknown query parameter {name[:100]!r}; {expected}",
                got=name[:100],
                expected=list(known),
            )

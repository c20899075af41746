"""Refuse unknown query parameters, since a misspelled one would be ignored silently."""

from collections.abc import Iterable, Sequence

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from bonsai_lora.errors import InvalidRequestError


async def refuse_unknown_query(request: Request) -> None:
    """Raise InvalidRequestError for the first query parameter that is unknown to the route."""
    if not request.scope["query_string"]:
        return
    route: APIRoute = request.scope["route"]
    check_known(request.query_params.keys(), _names(route.dependant))


def _names(dependant: Dependant) -> list[str]:
    """Return the query parameters of a route and of the functions that it depends on."""
    own = [one.alias for one in dependant.query_params]
    return own + [name for one in dependant.dependencies for name in _names(one)]


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InvalidRequestError for the first name in `given` that is not in `known`."""
    for name in given:
        if name not in known:
            expected = f"expected one of {', '.join(known)}" if known else "remove it"
            raise InvalidRequestError(
                f"unknown query parameter {name[:100]!r}; {expected}",
                got=name[:100],
                expected=list(known),
            )

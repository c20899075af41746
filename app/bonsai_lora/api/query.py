"""Query parameters that a route does not have are refused: a misspelled one would do nothing."""

from collections.abc import Iterable, Sequence

from fastapi import Request
from fastapi.routing import APIRoute

from bonsai_lora.errors import InvalidRequestError


async def refuse_unknown_query(request: Request) -> None:
    """Raise InvalidRequestError for the first query parameter that the route does not have."""
    if not request.scope["query_string"]:
        return
    route: APIRoute = request.scope["route"]
    known = [one.alias for one in route.dependant.query_params]
    check_known(request.query_params.keys(), known)


def check_known(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise InvalidRequestError for the first name in `given` that is not in `known`."""
    for name in given:
        if name not in known:
            expected = f"this route accepts {', '.join(known)}" if known else "this route has none"
            raise InvalidRequestError(
                f"unknown query parameter {name[:100]!r}; {expected}",
                got=name[:100],
                expected=list(known),
            )

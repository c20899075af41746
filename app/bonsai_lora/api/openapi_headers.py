"""Request and response headers in the OpenAPI document.

Most follow from the statuses of an operation: one that can return 412 reads conditions, one that
can return 206 reads ranges. Routes declare only the ETag and Location that they send.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_STRING = {"type": "string"}


def _header(
    description: str, schema: Mapping[str, Any] = _STRING, *, is_always_sent: bool = True
) -> dict[str, Any]:
    required = {"required": True} if is_always_sent else {}
    return {"description": description, **required, "schema": schema}


_RESPONSE_HEADERS = {
    "X-Request-Id": _header("id of the request in the service's log"),
    "ETag": _header("strong tag of this version, for If-Match and If-None-Match"),
    "Location": _header("path of what was created", {"type": "string", "format": "uri-reference"}),
    "Accept-Ranges": _header("byte ranges can be requested", {"type": "string", "enum": ["bytes"]}),
    "Content-Range": _header(
        "the range sent, unless there are several; the file's size after a 416",
        is_always_sent=False,
    ),
    "Bonsai-Delta-Gain": _header(
        "estimate of <D', D> / |D|^2 for the deltas D and what D' is left of them after the merged "
        "weights were rounded: 1 if all, 0 if nothing; missing until it is known",
        {"type": "number"},
        is_always_sent=False,
    ),
    "Preference-Applied": _header("`respond-async`: the answer is a job"),
    "WWW-Authenticate": _header("Bearer"),
    "Retry-After": _header(
        "seconds after which a retry can succeed",
        {"type": "integer", "minimum": 1},
        is_always_sent=False,
    ),
}
_REQUEST_HEADERS: dict[str, str] = {
    "X-Request-Id": "up to 128 letters, digits and `._:-`, to find the request in the log; made if "
    "missing",
    "If-Match": "change only what has one of these ETags; 412 otherwise",
    "If-None-Match": "ETags, or `*` for any: 304 if a GET would return one of them, 412 if a "
    "change would replace one",
    "Range": "`bytes=` and the wanted byte ranges",
    "If-Range": "an ETag: the whole file if it has changed",
}
_REQUEST_HEADERS_BY_STATUS = {
    "412": ("If-Match", "If-None-Match"),
    "304": ("If-None-Match",),
    "206": ("Range", "If-Range"),
}


def references(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return the headers `names` of a response, as the document describes them."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def sends(status: int, *names: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that sends these headers with this status."""
    return {status: {"headers": references(names)}}


def describe_headers(document: dict[str, Any]) -> None:
    """Add to each operation of the document the headers that it reads and sends."""
    components = document.setdefault("components", {})
    components["headers"] = _RESPONSE_HEADERS
    components["parameters"] = {
        name: {
            "name": name,
            "in": "header",
            "required": False,
            "description": text,
            "schema": _STRING,
        }
        for name, text in _REQUEST_HEADERS.items()
    }
    for item in document["paths"].values():
        for operation in item.values():
            _describe(operation)


def _describe(operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    read = ["X-Request-Id"]
    for status, names in _REQUEST_HEADERS_BY_STATUS.items():
        if status in responses:
            read += names
    operation.setdefault("parameters", []).extend(
        {"$ref": f"#/components/parameters/{name}"} for name in dict.fromkeys(read)
    )
    for status, response in responses.items():
        sent = references(_sent(status, responses))
        response["headers"] = sent | response.get("headers", {})


def _sent(status: str, responses: dict[str, Any]) -> Iterator[str]:
    """Yield the headers that follow from a status and the operation's other ones."""
    yield "X-Request-Id"
    if status in ("429", "503"):
        yield "Retry-After"
    if status == "401":
        yield "WWW-Authenticate"
    if status == "202":
        yield from ("Location", "Preference-Applied")
    if status in ("200", "206", "304") and "304" in responses:
        yield "ETag"
    if status in ("200", "206", "304") and "206" in responses:
        yield "Accept-Ranges"
    if status in ("206", "416"):
        yield "Content-Range"

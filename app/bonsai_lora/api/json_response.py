"""JSON responses whose length grows with the modules of a set."""

from collections.abc import Callable, Mapping

from pydantic import BaseModel
from starlette.responses import Response

from bonsai_lora.api.context import Context
from bonsai_lora.storage.setfile import StoredSet
from bonsai_lora.wire.media import Form

_QUICK_MODULES = 256
"""Describing more modules takes milliseconds, too long for the event loop."""


async def json_response(
    context: Context,
    describe: Callable[[], BaseModel],
    modules: int,
    headers: Mapping[str, str],
    status: int = 200,
) -> Response:
    """Return the model that `describe` makes of `modules` as JSON, made in a thread if large."""

    def write() -> bytes:
        return describe().model_dump_json().encode()

    content = write() if modules <= _QUICK_MODULES else await context.long.run(write)
    return Response(content, status, dict(headers), Form.JSON)


def set_headers(context: Context, stored: StoredSet, status: int) -> dict[str, str]:
    """Return the headers that describe a set: its ETag, and its Location if it is new."""
    headers = {"ETag": stored.record.etag}
    if status == 201:
        headers["Location"] = f"{context.settings.root_path}/v1/sets/{stored.record.name}"
    return headers

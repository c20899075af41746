"""JSON responses whose length grows with the modules of a set."""

from collections.abc import Callable, Mapping

from pydantic import BaseModel
from starlette.responses import Response

from bonsai_lora.api.context import Context
from bonsai_lora.wire.media import Form

_QUICK_MODULES = 256
"""Describing more modules than these takes milliseconds, which the event loop has not."""


async def described(
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
    return Response(content, status, dict(headers), Form.JSON.value)

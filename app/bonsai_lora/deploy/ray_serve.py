"""The service as an application of Ray Serve: `serve run bonsai_lora.deploy.ray_serve:app store=…`.

Each replica is the whole application, and knows of no other. They share the store, so it must be
one that several machines can share. docs/cluster.md shows a configuration, and what it costs.
"""

from fastapi import FastAPI
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings

BALANCE_ALGORITHM = (
    """hash 'path,regsub("^/(v1/sets|v2/models|v2/repository/models|api/models/[^/]+"""
    r"""|v1/bases/[^/]+/(merged|survival)|[^/]+)/([^/]+?)(\.git)?(/.*)?$","\3")'"""
    "\n    hash-type consistent"
)
"""What RAY_SERVE_HAPROXY_BALANCE_ALGORITHM has to be for each set to have a replica of its own.

Ray 2.60 writes it into HAProxy's configuration as it is, so a line break adds a second directive.
"""

_OTHER_REQUESTS = 32
"""Health checks and small reads that a replica answers while all its places are taken."""


def app(settings: dict[str, str]) -> serve.Application:
    """Return the application with `settings`, by their names in docs/settings.md in lower case.

    What is not given is read from BONSAI_LORA_* variables on each replica. Replicas refuse with 503
    what exceeds `max_concurrency`, so that Ray need not queue requests before them.
    """

    def build() -> ASGIApp:
        return _WithoutRequestId(create_app(Settings(**settings)))  # type: ignore[arg-type]

    lanes = 2
    places = lanes * Settings(**settings).max_concurrency  # type: ignore[arg-type]
    deployment = serve.deployment(serve.ingress(build)(), name="BonsaiLora")
    return deployment.options(max_ongoing_requests=places + _OTHER_REQUESTS).bind()


class _WithoutRequestId:
    """Leaves the header X-Request-Id to Ray, which adds it to each answer."""

    def __init__(self, inner: FastAPI) -> None:
        self._inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._inner(scope, receive, forward)

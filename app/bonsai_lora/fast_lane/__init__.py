"""Accelerator: serve the hottest routes straight from the socket, without ASGI and FastAPI.

Per request, ASGI and FastAPI need a task, a scope, a message queue, routing and dependency
injection, which together cost ten times as much as applying an adapter to one vector. This package
extends uvicorn's protocol: when the next bytes on an idle keep-alive connection are the head of a
POST to a route that takes a `Call`, the route's function is called directly with a `LaneCall`.
Everything else goes to uvicorn's parser. The package is optional: without it, responses are the
same (docs/decisions/0011-hot-routes.md, 0012-direct-bodies.md).
"""

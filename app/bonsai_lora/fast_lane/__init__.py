"""ACCELERATOR: the routes that take a `Call`, from the socket and back without the framework.

ASGI and FastAPI cost ten times as much as applying an adapter to one vector does: a task, a scope,
a queue of messages, routing and dependencies per request. So uvicorn's protocol is extended: where
the bytes between two requests begin with the head of a POST to such a route, the route's own
function is called with a `LaneCall`. Everything else goes on to uvicorn's parser, as if this
package were not there. Without it the service gives the same answers
(docs/decisions/0011-hot-routes.md, 0012-direct-bodies.md).
"""

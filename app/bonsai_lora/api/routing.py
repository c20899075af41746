"""All routes of the service."""

from fastapi import APIRouter, Depends
from fastapi.routing import APIRoute

from bonsai_lora.api.context import get_context
from bonsai_lora.api.query import refuse_unknown_query
from bonsai_lora.api.routes import (
    adapters,
    apply,
    hub,
    hub_push,
    jobs,
    lab,
    lfs,
    merge,
    oip,
    operations,
    page,
    set_files,
    sets,
    shared_memory,
    stats,
    vllm,
)
from bonsai_lora.api.routes import bases as bases_routes

_ROUTERS = [
    one.router
    for one in (
        sets,
        set_files,
        adapters,
        apply,
        merge,
        bases_routes,
        oip,
        shared_memory,
        stats,
        lab,
        jobs,
        operations,
        page,
        vllm,
        hub_push,
        lfs,
        hub,  # last: its paths match almost anything
    )
]


def _heads_of(router: APIRouter) -> APIRouter:
    """Return a HEAD for each GET: the server drops the body of its response."""
    heads = APIRouter()
    for route in router.routes:
        if isinstance(route, APIRoute) and "GET" in (route.methods or ()):
            heads.add_api_route(
                route.path,
                route.endpoint,
                methods=["HEAD"],
                response_model=route.response_model,
                response_model_exclude_unset=route.response_model_exclude_unset,
                include_in_schema=False,
            )
    return heads


_STRICT_ROUTERS = [
    one.router for one in (sets, set_files, adapters, merge, bases_routes, stats, lab, jobs)
]
"""Routers that refuse unknown query parameters. Apply parses its own; clients of the Hub and of the
Open Inference Protocol send additional ones."""


def _router_of_all() -> tuple[APIRouter, list[APIRoute]]:
    """Return a router that includes all routes, and the routes."""
    # Without an `operation_id` of its own, a route has the name of its function.
    whole = APIRouter(generate_unique_id_function=lambda route: route.name)
    routes = list[APIRoute]()
    for router in _ROUTERS:
        strict = [Depends(refuse_unknown_query)] if router in _STRICT_ROUTERS else []
        for one in (router, _heads_of(router)):
            # get_context checks the scope of the key; routes that use no context need it too.
            whole.include_router(one, dependencies=[Depends(get_context), *strict])
            routes += [route for route in one.routes if isinstance(route, APIRoute)]
    return whole, routes


# Made once, and matched once: FastAPI analyzes the functions of an included router when the first
# request comes, which took 50 ms or more on the event loop of each new worker.
ROUTER, ROUTES = _router_of_all()
for included in ROUTER.routes:
    included.matches({"type": "http", "method": "GET", "path": "/", "root_path": ""})

"""The page of the service, and Swagger UI for its OpenAPI document, served from this host only."""

import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "page"

_HEADERS = {
    # Swagger UI's style sheet has icons in data: URLs.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The URLs are not versioned, so browsers must revalidate.
    "Cache-Control": "no-cache",
}


class _Page(StaticFiles):
    """The files of the page, with `_HEADERS`."""

    def file_response(
        self, full_path: Any, stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """Return the response for a file: 200, or 304."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_HEADERS)
        if not Path(full_path).suffix:  # a license
            response.headers["Content-Type"] = "text/plain; charset=utf-8"
        return response


_FILES = _Page(directory=FOLDER)


@router.get("/")
async def get_root(request: Request) -> Response:
    """Return the page that shows the service, whose scripts call the same routes as everybody."""
    return await _FILES.get_response("index.html", request.scope)


@router.get("/docs")
async def get_docs(request: Request) -> Response:
    """Return the documentation of the HTTP API."""
    return await _FILES.get_response("docs.html", request.scope)


@router.get("/page/{path:path}")
async def get_page_file(request: Request, path: str) -> Response:
    """Return a script, a style sheet or a license."""
    return await _FILES.get_response(path, request.scope)

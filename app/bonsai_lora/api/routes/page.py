"""The page of the service, and Swagger UI for its OpenAPI document, served from this host only."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastapi import APIRouter, Request, Response

from bonsai_lora.api.conditions import not_modified
from bonsai_lora.errors import RouteNotFoundError

router = APIRouter(include_in_schema=False)

FOLDER = Path(__file__).parents[2] / "page"

_MEDIA_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript"}
"""By suffix; everything else is plain text."""

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


@dataclass(frozen=True, slots=True)
class PageFile:
    """A static file."""

    content: bytes
    media_type: str
    etag: str


@cache
def page_files() -> Mapping[str, PageFile]:
    """Return all files in `FOLDER` by relative path, read once per process (about 2 MB)."""
    paths = (path for path in FOLDER.rglob("*") if path.is_file())
    return {path.relative_to(FOLDER).as_posix(): _read(path) for path in paths}


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    media_type = _MEDIA_TYPES.get(path.suffix, "text/plain")
    return PageFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


@router.get("/")
async def get_root(request: Request) -> Response:
    """Return the page that shows the service, whose scripts call the same routes as everybody."""
    return _respond(request, page_files()["index.html"])


@router.get("/docs")
async def get_docs(request: Request) -> Response:
    """Return the documentation of the HTTP API."""
    return _respond(request, page_files()["docs.html"])


@router.get("/page/{path:path}")
async def get_page_file(request: Request, path: str) -> Response:
    """Return a script, a style sheet or a license; raises RouteNotFoundError."""
    file = page_files().get(path)
    if file is None:
        raise RouteNotFoundError(f"there is no file {path[:200]!r} under /page; open /docs")
    return _respond(request, file)


def _respond(request: Request, file: PageFile) -> Response:
    headers = {"ETag": file.etag, **_HEADERS}
    if not_modified(request, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)

"""The Hugging Face Hub API: `{base}/{set}` is a merged model, `adapters/{set}` the adapter.

Implements what huggingface_hub 2.4, transformers 5.23 and peft 0.21 request with HF_ENDPOINT set.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.errors import HubError
from bonsai_lora.api.merged_file import StreamedFile
from bonsai_lora.api.middleware import decode_slashes
from bonsai_lora.api.ranges import BytesFile, RangedFile, file_response
from bonsai_lora.service import sets
from bonsai_lora.service.merged import weighted_sets
from bonsai_lora.storage.setfile import SetRecord

router = APIRouter(include_in_schema=False)

ADAPTERS = "adapters"


@dataclass(frozen=True, slots=True)
class _Repo:
    """A repository as Hub clients see it."""

    id: str
    commit: str
    record: SetRecord
    files: Mapping[str, RangedFile]

    def info(self) -> dict[str, Any]:
        """Return the Hub's description of a model."""
        return {
            "_id": self.commit[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": self.commit,
            "lastModified": self.record.updated_at,
            "createdAt": self.record.created_at,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["safetensors"],
            "siblings": [{"rfilename": name} for name in self.files],
        }


@router.get("/{owner}/{name}/resolve/{revision}/{path:path}")
@router.head("/{owner}/{name}/resolve/{revision}/{path:path}")
async def resolve(
    request: Request, context: ContextDep, owner: str, name: str, revision: str, path: str
) -> Response:
    """Return one file of a repository."""
    repo = await _repo(context, owner, name, revision)
    path = decode_slashes(path)
    file = repo.files.get(path)
    if file is None:
        detail = f"{repo.id} has no file {path!r}; it has {', '.join(list(repo.files)[:16])}"
        raise HubError("EntryNotFound", detail)
    return file_response(request, file, context.long, {"X-Repo-Commit": repo.commit})


@router.get("/api/models")
async def list_models(
    context: ContextDep,
    author: Annotated[str | None, Query()] = None,
    search: Annotated[str | None, Query()] = None,
    limit: Annotated[int, Query(ge=1)] = 1000,
) -> list[dict[str, Any]]:
    """Return the repositories of an author: the merged models of a base, or the adapters."""
    owners = [author] if author else [ADAPTERS, *context.bases.names()]
    found: list[dict[str, Any]] = []
    for owner in owners:
        for name in context.store.list_names():
            if search and search.lower() not in f"{owner}/{name}".lower():
                continue
            try:
                found.append((await _repo(context, owner, name, "main")).info())
            except (HubError, errors.NewerFormatError):
                continue
            if len(found) == min(limit, 1000):
                return found
    return found


@router.get("/api/models/{owner}/{name}")
@router.get("/api/models/{owner}/{name}/revision/{revision}")
async def model_info(
    context: ContextDep, owner: str, name: str, revision: str = "main"
) -> Response:
    """Return a repository's metadata and file names."""
    repo = await _repo(context, owner, name, revision)
    return _json(repo.info())


@router.get("/api/models/{owner}/{name}/tree/{revision}")
async def tree(context: ContextDep, owner: str, name: str, revision: str) -> Response:
    """Return a repository's files with their sizes."""
    repo = await _repo(context, owner, name, revision)
    return _json(
        [
            {"type": "file", "oid": file.etag.strip('"'), "size": file.size_bytes, "path": path}
            for path, file in repo.files.items()
        ]
    )


async def _repo(context: Context, owner: str, name: str, revision: str) -> _Repo:
    """Return a repository at `revision`: main, the set's version, or the commit."""
    make = _adapter_repo if owner == ADAPTERS else _merged_repo
    try:
        repo = await context.long.run(lambda: make(context, owner, name))
    except (errors.NotFoundError, errors.InvalidError) as error:
        raise HubError("RepoNotFound", error.detail) from None
    version = str(repo.record.version)
    if revision not in ("main", version, repo.commit):
        raise HubError(
            "RevisionNotFound",
            f"{repo.id} has no revision {revision[:80]!r}; use main or its version {version}",
        )
    return repo


def _adapter_repo(context: Context, owner: str, name: str) -> _Repo:
    stored = context.store.read(name)
    record = stored.record
    config = sets.export_config(stored)
    files: dict[str, RangedFile] = {
        "adapter_config.json": _bytes_file(config, record.etag, "config"),
        "adapter_model.safetensors": _bytes_file(stored.file, record.etag, "model"),
    }
    commit = hashlib.sha256(record.etag.encode()).hexdigest()[:40]
    return _Repo(f"{owner}/{name}", commit, record, files)


def _merged_repo(context: Context, owner: str, name: str) -> _Repo:
    record = context.store.read(name).record
    model = context.models.get(owner, weighted_sets(name, 1.0, [], []))
    if model.etags != [record.etag]:  # changed between the two reads
        return _merged_repo(context, owner, name)
    files: dict[str, RangedFile] = {}
    for path in model.files():
        file = model.file(path)
        assert file is not None
        files[path] = StreamedFile(file, context.executor, context.settings.threads)
    return _Repo(f"{owner}/{name}", model.digest, record, files)


def _bytes_file(content: bytes | memoryview, etag: str, part: str) -> BytesFile:
    # Hub clients name cached files by ETag, which must be unique per file: 40 hex digits.
    digest = hashlib.sha256(f"{etag}/{part}".encode()).hexdigest()[:40]
    return BytesFile(memoryview(content), f'"{digest}"', "application/octet-stream")


def _json(value: Any) -> Response:
    return Response(json.dumps(value), media_type="application/json")

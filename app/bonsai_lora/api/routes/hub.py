"""The Hugging Face Hub API: `{base}/{set}` is a merged model, `adapters/{set}` the adapter,
`bases/{base}` the base.

Implements what huggingface_hub 2.4, transformers 5.23 and peft 0.21 request with HF_ENDPOINT set.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import parse_qs, urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from bonsai_lora import errors
from bonsai_lora.api.body import MODEL_BYTES, read_body
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.errors import HubError
from bonsai_lora.api.merged_file import StreamedFile, gain_headers
from bonsai_lora.api.middleware import decode_slashes
from bonsai_lora.api.ranges import BytesFile, RangedFile, file_response
from bonsai_lora.checkpoints.folder import CONFIG_FILE
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.parts import digest_of, etag_of
from bonsai_lora.service import sets
from bonsai_lora.service.hub import ADAPTERS, BASES, PAGE, page_of
from bonsai_lora.service.keys import ANYONE
from bonsai_lora.service.merged import weighted_sets
from bonsai_lora.storage.setfile import SetRecord

router = APIRouter(include_in_schema=False)

_CARD = "README.md"


@dataclass(frozen=True, slots=True)
class _Repo:
    """A repository as Hub clients see it."""

    id: str
    commit: str
    version: int
    created_at: str
    updated_at: str
    files: Mapping[str, RangedFile]
    refusal: errors.UnmergeableError | None = None
    """Why the content of the files cannot be read: the set does not fit the base.

    The files are described nevertheless. For a refused HEAD or description, huggingface_hub reports
    a missing repository or a lost connection, or loads older files from its cache; for a refused
    GET of a file, the reason.
    """
    model: MergedModel | None = None
    """The model, if it is a merged one."""

    def entry(self, path: str) -> dict[str, Any]:
        """Return the Hub's description of one of the files."""
        file = self.files[path]
        return {
            "type": "file",
            "oid": file.etag.strip('"'),
            "size": file.size_bytes,
            "path": path,
        }

    def tree(self, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Return the entries in a folder, that of the repository if empty; empty if it has none."""
        start = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path in self.files:
            parts = path.removeprefix(start).split("/")
            if not path.startswith(start):
                continue
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = start + "/".join(parts[:depth])
                found[inner] = self._folder(inner)
            if recursive or len(parts) == 1:
                found[path] = self.entry(path)
        return list(found.values())

    def _folder(self, path: str) -> dict[str, Any]:
        oid = digest_of(f"{self.commit}/{path}")
        return {"type": "directory", "oid": oid, "size": 0, "path": path}

    def paths(self, wanted: Collection[str]) -> list[dict[str, Any]]:
        """Return the entries of `wanted`, files and folders; leave out unknown paths."""
        return [one for one in self.tree("", recursive=True) if one["path"] in wanted]

    def info(self, blobs: bool = False) -> dict[str, Any]:
        """Return the Hub's description of a model, with the files' sizes if `blobs`."""
        return {
            "_id": self.commit[:24],
            "id": self.id,
            "modelId": self.id,
            "author": self.id.partition("/")[0],
            "sha": self.commit,
            "lastModified": self.updated_at,
            "createdAt": self.created_at,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["safetensors"],
            "siblings": [self._sibling(name, blobs) for name in self.files],
        }

    def _sibling(self, path: str, blobs: bool) -> dict[str, Any]:
        if not blobs:
            return {"rfilename": path}
        entry = self.entry(path)
        return {"rfilename": path, "size": entry["size"], "blobId": entry["oid"]}


@router.get("/{owner}/{name}/resolve/{revision}/{path:path}")
async def resolve(
    request: Request, context: ContextDep, owner: str, name: str, revision: str, path: str
) -> Response:
    """Return one file of a repository."""
    path = decode_slashes(path)
    if owner == ADAPTERS and path == _CARD:
        # Asked for before the first push, when huggingface_hub expects an empty repository.
        raise HubError("EntryNotFound", f"{owner}/{name} has no {_CARD}: sets have no model cards")
    repo = await _repo(context, owner, name, revision)
    file = repo.files.get(path)
    if file is None:
        detail = f"{repo.id} has no file {path!r}; it has {', '.join(list(repo.files)[:16])}"
        raise HubError("EntryNotFound", detail)
    if repo.refusal is not None and request.method == "GET":
        raise repo.refusal
    gain = {} if repo.model is None else gain_headers(context.gains, repo.model, path)
    return file_response(request, file, context.long, {"X-Repo-Commit": repo.commit, **gain})


@router.get("/api/models")
async def list_models(
    request: Request,
    context: ContextDep,
    author: Annotated[str, Query()] = "",
    search: Annotated[str, Query()] = "",
    limit: Annotated[int, Query(ge=1)] = PAGE,
    cursor: Annotated[str, Query()] = "",
) -> Response:
    """Return a page of the repositories of an author: merged models of a base, adapters, or bases.

    Those that do not fit their base are left out. The header Link leads to the next page.
    """
    names, more = await context.long.run(
        page_of, context.store, context.bases, author, search, cursor, min(limit, PAGE)
    )
    found: list[dict[str, Any]] = []
    for owner, name in names:
        try:
            repo = await _repo(context, owner, name, "main")
        except (HubError, errors.UnauthenticatedError, errors.NewerFormatError):
            continue
        if repo.refusal is None:
            found.append(repo.info())
    answer = JSONResponse(found)
    if more:
        query = {**request.query_params, "cursor": more}
        address = f"{request.scope['address']}{context.settings.root_path}/api/models"
        answer.headers["Link"] = f'<{address}?{urlencode(query)}>; rel="next"'
    return answer


@router.get("/api/models/{owner}/{name}")
@router.get("/api/models/{owner}/{name}/revision/{revision}")
async def model_info(
    context: ContextDep, owner: str, name: str, revision: str = "main", blobs: bool = False
) -> Response:
    """Return a repository's metadata and file names, with sizes if `blobs`."""
    repo = await _repo(context, owner, name, revision)
    return JSONResponse(repo.info(blobs))


@router.get("/api/models/{owner}/{name}/tree/{revision}")
@router.get("/api/models/{owner}/{name}/tree/{revision}/{path:path}")
async def tree(
    context: ContextDep,
    owner: str,
    name: str,
    revision: str,
    path: str = "",
    recursive: bool = False,
) -> Response:
    """Return the files of a folder with their sizes, and its folders."""
    repo = await _repo(context, owner, name, revision)
    folder = decode_slashes(path).strip("/")
    found = repo.tree(folder, recursive=recursive)
    if folder and not found:
        raise HubError("EntryNotFound", f"{repo.id} has no folder {folder!r}")
    return JSONResponse(found)


@router.post("/api/models/{owner}/{name}/paths-info/{revision}")
async def paths_info(
    request: Request, context: ContextDep, owner: str, name: str, revision: str
) -> Response:
    """Return the files and folders that the form's `paths` name; leave out others, like the Hub."""
    body = await read_body(request, MODEL_BYTES)
    form = await context.long.run(parse_qs, body.decode("utf-8", "replace"))
    wanted = set(form.get("paths", ()))
    repo = await _repo(context, owner, name, revision)
    return JSONResponse(repo.paths(wanted))


@router.get("/api/models/{owner}/{name}/refs")
async def refs(context: ContextDep, owner: str, name: str) -> Response:
    """Return the one branch of a repository, main."""
    repo = await _repo(context, owner, name, "main")
    main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commit}
    return JSONResponse({"branches": [main], "converts": [], "tags": [], "pullRequests": []})


@router.get("/api/models/{owner}/{name}/commits/{revision}")
async def commits(context: ContextDep, owner: str, name: str, revision: str) -> Response:
    """Return the current commit; older versions are not kept."""
    repo = await _repo(context, owner, name, revision)
    title = f"Version {repo.version}"
    date = repo.updated_at
    return JSONResponse(
        [{"id": repo.commit, "title": title, "message": "", "authors": [], "date": date}]
    )


@router.get("/api/models/{owner}/{name}/auth-check")
async def auth_check(context: ContextDep, owner: str, name: str) -> Response:
    """Return 200 if the repository exists for the caller, who may then read it."""
    await _repo(context, owner, name, "main")
    return JSONResponse({})


@router.get("/api/whoami-v2")
async def whoami(context: ContextDep) -> Response:
    """Return the key as a user. Without keys, there are no accounts, and the token is ignored."""
    key = context.store.key
    name = "anonymous" if key is ANYONE else key.id
    return JSONResponse({"type": "user", "id": name, "name": name, "fullname": name, "orgs": []})


async def _repo(context: Context, owner: str, name: str, revision: str) -> _Repo:
    """Return a repository at `revision`: main, the set's version, or the commit."""
    make = _MAKERS.get(owner, _merged_repo)
    try:
        repo = await context.long.run(make, context, owner, name)
    except (errors.NotFoundError, errors.InvalidError) as error:
        if context.store.key.sees_all:
            raise HubError("RepoNotFound", error.detail) from None
        # As the Hub answers for what a token does not see, whether it exists or not.
        raise errors.UnauthenticatedError(error.detail) from None
    version = str(repo.version)
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
    return _of_set(f"{owner}/{name}", commit_of(record), record, files)


def commit_of(record: SetRecord) -> str:
    """Return the commit that stands for a set's version."""
    return digest_of(record.etag)


def _merged_repo(context: Context, owner: str, name: str) -> _Repo:
    record = context.store.read(name).record
    try:
        model = context.models.get(context.store, owner, weighted_sets(name, 1.0, [], []))
    except errors.InvalidError as error:
        return _refused_repo(
            context, owner, record, errors.UnmergeableError(error.detail, **error.values)
        )
    if model.etags != [record.etag]:  # changed between the two reads
        return _merged_repo(context, owner, name)
    return _of_set(f"{owner}/{name}", model.digest, record, *_streamed(context, model), model)


def _base_repo(context: Context, owner: str, name: str) -> _Repo:
    model = context.models.get(context.store, name, [])
    changed = max(file.modified_ns for file in model.base.files.values())
    date = f"{datetime.fromtimestamp(changed // 10**9, UTC):%Y-%m-%dT%H:%M:%S.000Z}"
    return _Repo(f"{owner}/{name}", model.digest, 1, date, date, *_streamed(context, model))


_MAKERS = {ADAPTERS: _adapter_repo, BASES: _base_repo}


def _of_set(
    repo: str,
    commit: str,
    record: SetRecord,
    files: Mapping[str, RangedFile],
    refusal: errors.UnmergeableError | None = None,
    model: MergedModel | None = None,
) -> _Repo:
    dates = record.created_at, record.updated_at
    return _Repo(repo, commit, record.version, *dates, files, refusal, model)


def _streamed(
    context: Context, model: MergedModel
) -> tuple[Mapping[str, RangedFile], errors.UnmergeableError | None]:
    """Return the files of a model, and why they cannot be read.

    If it cannot be a checkpoint, that is the file which clients read first.
    """
    try:
        files = context.models.files(model)
    except errors.UnsupportedGgufError as error:
        refusal = errors.UnmergeableError(error.detail, **error.values)
        tag = etag_of(f"{model.digest}/refused/{CONFIG_FILE}")
        return {CONFIG_FILE: _RefusedFile(1, tag, refusal)}, refusal
    return {
        path: StreamedFile(file, context.executor, context.settings.threads)
        for path, file in files.items()
    }, None


@dataclass(slots=True)
class _RefusedFile:
    """A file whose size is known and whose content is refused."""

    size_bytes: int
    etag: str
    refusal: errors.UnmergeableError
    media_type: str = "application/octet-stream"

    def read(self, start: int, stop: int) -> AsyncIterator[bytes | memoryview]:  # noqa: ARG002
        """Raise UnmergeableError."""
        raise self.refusal


def _refused_repo(
    context: Context, base: str, record: SetRecord, refusal: errors.UnmergeableError
) -> _Repo:
    """Return a repository of the base's names and sizes, under tags that no readable file has."""
    model = context.models.get(context.store, base, [])
    key = f"{model.digest}/{record.etag}/refused"
    files = {
        path: _RefusedFile(file.size_bytes, etag_of(f"{key}/{path}"), refusal)
        for path, file in _streamed(context, model)[0].items()
    }
    return _of_set(f"{base}/{record.name}", digest_of(key), record, files, refusal)


def _bytes_file(content: bytes | memoryview, etag: str, part: str) -> BytesFile:
    return BytesFile(memoryview(content), etag_of(f"{etag}/{part}"), "application/octet-stream")

"""The writing half of the Hugging Face Hub API: a commit to `adapters/{set}` is an upload.

Implements what huggingface_hub 2.4 sends for `upload_folder`, `push_to_hub` and `hf upload`. Both
files are "regular" ones, whose content is in the commit, unless the client asks for Git LFS, which
`lfs` implements.
"""

from collections.abc import Iterable, Sequence

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from bonsai_lora import errors
from bonsai_lora.api import schemas
from bonsai_lora.api.body import MODEL_BYTES, check_length, read_body, read_model
from bonsai_lora.api.commits import Commit, receive_commit
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.routes.hub import commit_of
from bonsai_lora.formats.peft_config import CONFIG_FILE, MODEL_FILE
from bonsai_lora.service import sets
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.hub import ADAPTERS
from bonsai_lora.service.lfs import read_staged
from bonsai_lora.service.sets import Imported, Precondition
from bonsai_lora.service.work import Place
from bonsai_lora.storage.setfile import SetRecord
from bonsai_lora.storage.staging import Staged
from bonsai_lora.storage.upload import Upload

router = APIRouter(include_in_schema=False)

_STORED = (CONFIG_FILE, MODEL_FILE)
_SILENT = ("README.md", ".gitattributes", ".gitignore")
"""Files of every pushed folder, whose absence surprises nobody."""
_LFS_ORIGIN = "origin/lfs"
_MOST_WARNINGS = 8
_WARNING_CHARACTERS = 400


class _NewRepo(BaseModel):
    name: str
    organization: str | None = None
    type: str | None = None


class _File(BaseModel):
    path: str
    size: int = Field(0, ge=0)


class _Preupload(BaseModel):
    files: list[_File] = Field(max_length=1000)


@router.post("/api/repos/create")
async def create_repo(request: Request, context: ContextDep) -> Response:
    """Check that the repository can be pushed to. Keeps nothing: the first commit makes the set."""
    with Place(context.long) as place:
        wanted = await read_model(request, _NewRepo, place)
    owner = wanted.organization or ""
    if wanted.type not in (None, "model"):
        raise errors.InvalidRequestError(
            f"the repository is a {wanted.type[:40]!r}; create a model", field="type"
        )
    check_target(context, owner, wanted.name)
    url = _url_of(request, owner, wanted.name)
    try:
        await context.opening.run(context.store.read_record, wanted.name)
    except errors.SetNotFoundError:
        return JSONResponse({"url": url, "name": f"{owner}/{wanted.name}"})
    # huggingface_hub reads the URL even from the refusal, if the caller accepts an existing one.
    raise errors.SetExistsError(
        f"{owner}/{wanted.name} exists; push to it, which replaces the set", url=url
    )


@router.post("/api/validate-yaml")
async def validate_yaml(request: Request, context: ContextDep) -> Response:
    """Accept any README.md, as it is not stored."""
    with Place(context.long) as place:
        await read_body(request, MODEL_BYTES, place)
    return JSONResponse({"errors": [], "warnings": []})


@router.post("/api/models/{owner}/{name}/preupload/{revision}")
async def preupload(
    request: Request, context: ContextDep, owner: str, name: str, revision: str
) -> Response:
    """Say which files the commit should have: both adapter files, in full, and no other."""
    check_target(context, owner, name, revision)
    with Place(context.long) as place:
        wanted = await read_model(request, _Preupload, place)
    for file in wanted.files:
        if file.path == MODEL_FILE:
            check_length(file.size, context.limits.max_upload_bytes)
    special = {MODEL_FILE: "lfs"} if _asks_for_lfs(request) else {}
    modes = [
        {
            "path": one.path,
            "uploadMode": special.get(one.path, "regular"),
            "shouldIgnore": one.path not in _STORED,
        }
        for one in wanted.files
    ]
    topic, texts = _about_ignored([one.path for one in wanted.files])
    return _warned(JSONResponse({"files": modes}), f"{owner}/{name} {topic}", texts)


@router.post("/api/models/{owner}/{name}/commit/{revision}")
async def commit(
    request: Request,
    context: ContextDep,
    owner: str,
    name: str,
    revision: str,
    create_pr: bool = False,
) -> Response:
    """Create or replace the set atomically, as an upload does; the answer has its report."""
    check_target(context, owner, name, revision)
    if create_pr:
        raise errors.InvalidRequestError(
            "create_pr is set, but sets have no pull requests; push to main", field="create_pr"
        )
    with (
        Place(context.long) as place,
        context.store.new_file() as file,
        Reservation(context.spill) as reserved,
    ):
        upload = Upload(file, context.limits.max_header_bytes)
        limit = context.limits.max_upload_bytes
        pushed = await receive_commit(request, upload, limit, reserved, place)
        if pushed.config is None:
            return await context.opening.run(_unchanged, request, context, name, pushed)
        if pushed.pointer is not None:
            reserved.add(pushed.pointer[1])
        imported = await context.long.run(_import, context, name, pushed, upload)
        return await context.long.run(_committed, request, name, imported)


def check_target(context: Context, owner: str, name: str, revision: str = "main") -> None:
    """Raise an error if nothing can be pushed there."""
    if owner != ADAPTERS:
        raise errors.InvalidRequestError(
            f"the repository {f'{owner[:100]}/{name[:100]}'.lstrip('/')!r} is not that of a set; "
            f"push to {ADAPTERS}/{name[:100]}",
            got=owner[:100],
            expected=ADAPTERS,
        )
    if revision != "main":
        raise errors.InvalidRequestError(
            f"the revision is {revision[:100]!r}, but a set has only main; push to that",
            field="revision",
        )
    context.store.check_name(name)


def _about_ignored(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Return the topic and the texts of the warning about files that are not stored."""
    ignored = [path for path in paths if path not in (*_STORED, *_SILENT)]
    if not ignored:
        return "files", []
    named = ", ".join(ignored[:8])
    if any(path in _STORED for path in paths):
        return "files", [f"a set has two files; not stored: {named}"]
    # huggingface_hub makes no commit then, and reports success.
    wanted = " and ".join(_STORED)
    return "nothing", [f"push a folder with {wanted} in it; none of these is stored: {named}"]


def _asks_for_lfs(request: Request) -> bool:
    """Return whether the client asks for Git LFS, as HF_HUB_USER_AGENT_ORIGIN=lfs makes it do.

    Nothing else that it sends shows whether it has Xet, which it would then use without a fallback.
    """
    parts = request.headers.get("user-agent", "").split(";")
    return any(one.strip() == _LFS_ORIGIN for one in parts)


def _import(context: Context, name: str, pushed: Commit, upload: Upload) -> Imported:
    """Import the adapter of a commit, and drop its weights from where they were staged."""
    assert pushed.config is not None
    staged = None if pushed.pointer is None else Staged(name, *pushed.pointer)
    if staged is not None:
        read_staged(context.store, staged, upload)
    imported = sets.import_adapter(
        context.store, name, pushed.config, upload, _precondition(pushed)
    )
    if staged is not None:
        context.store.staging(name).remove(staged)
    return imported


def _precondition(pushed: Commit) -> Precondition:
    """Return a function that checks that the set is still at the commit to replace, if any."""

    def check(present: SetRecord | None) -> None:
        current = None if present is None else commit_of(present)
        if pushed.parent is not None and pushed.parent != current:
            raise errors.PreconditionFailedError(
                f"the parent commit is {pushed.parent[:100]!r}, but the set is at {current}; pull "
                "it and push again",
                got=pushed.parent[:100],
                expected=current,
            )

    return check


def _unchanged(request: Request, context: Context, name: str, pushed: Commit) -> Response:
    """Answer a commit of neither file: nothing changes, but the set has to exist."""
    record = context.store.find_record(name)
    if record is None:
        raise errors.InvalidRequestError(
            f"the commit has neither {CONFIG_FILE} nor {MODEL_FILE}; push a folder that PEFT's "
            "save_pretrained wrote",
            expected=[CONFIG_FILE, MODEL_FILE],
        )
    _precondition(pushed)(record)
    return JSONResponse(_commit_info(request, record))


def _committed(request: Request, name: str, imported: Imported) -> Response:
    record = imported.stored.record
    report = schemas.ImportReport.of(imported)
    ignored = [f"not imported, by design: {key}" for key in imported.ignored_keys]
    topic = f"{ADAPTERS}/{name} version {record.version}"
    answer = JSONResponse(
        {**_commit_info(request, record), "report": report.model_dump(mode="json")}
    )
    return _warned(answer, topic, [*imported.warnings, *ignored])


def _commit_info(request: Request, record: SetRecord) -> dict[str, object]:
    oid = commit_of(record)
    url = f"{_url_of(request, ADAPTERS, record.name)}/commit/{oid}"
    return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""}


def _url_of(request: Request, owner: str, name: str) -> str:
    return f"{str(request.base_url).rstrip('/')}/{owner}/{name}"


def _warned(answer: Response, topic: str, texts: Iterable[str]) -> Response:
    """Add headers that huggingface_hub logs as warnings, one per topic; return `answer`."""
    for number, text in enumerate(list(texts)[:_MOST_WARNINGS], 1):
        answer.headers.append("X-HF-Warning", f"{topic} {number}; {_printable(text)}")
    return answer


def _printable(text: str) -> str:
    """Return `text` as a header may carry it."""
    ascii_text = text.encode("ascii", "replace").decode()
    return "".join(one if one.isprintable() else "?" for one in ascii_text)[:_WARNING_CHARACTERS]

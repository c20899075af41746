"""Git LFS, as far as uploads need it: large weights are sent before the commit that names them.

Implements the batch API and the basic transfer of git-lfs (`docs/api/batch.md`,
`docs/api/basic-transfers.md` there). The transfer carries no key, so its link is signed.
"""

import json
import math
from collections.abc import Sequence
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from bonsai_lora import errors
from bonsai_lora.api.body import (
    MODEL_BYTES,
    body_parts,
    check_length,
    check_media_type,
    check_not_compressed,
    content_length,
    parse_model,
    read_body,
)
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep
from bonsai_lora.api.errors import LFS_TYPE, status_of
from bonsai_lora.api.routes.hub_push import check_target
from bonsai_lora.api.uploads import WRITE_BYTES, write_weights
from bonsai_lora.formats.peft_config import MODEL_FILE
from bonsai_lora.service import lfs
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.hub import ADAPTERS
from bonsai_lora.service.lfs import BATCH_PATH, LINK_SECONDS, Link
from bonsai_lora.service.work import Place
from bonsai_lora.storage.staging import Staged
from bonsai_lora.storage.upload import HashedUpload

router = APIRouter(include_in_schema=False)

_REFUSALS = (
    errors.InvalidError,
    errors.TooLargeError,
    errors.QuotaExceededError,
    errors.StoreFullError,
)
"""Errors that are about one object."""
_OBJECTS = "/adapters/{name}.git/info/lfs/objects"


class _Object(BaseModel):
    oid: str
    size: int = Field(ge=0, lt=1 << 53)


class _Batch(BaseModel):
    """A batch. Its `ref`, the branch that a client of git is on, means nothing here."""

    operation: str
    transfers: list[str] = ["basic"]
    hash_algo: str = "sha256"
    objects: list[_Object] = Field(max_length=256)


@router.post(f"{_OBJECTS}/batch")
async def batch(request: Request, context: ContextDep, name: str) -> Response:
    """Say where each object can be uploaded, or that it is there already."""
    check_target(context, ADAPTERS, name)
    check_media_type(request, LFS_TYPE, "a batch")
    with Place(context.long) as place:
        wanted = parse_model(await read_body(request, MODEL_BYTES, place), _Batch)
        _check_batch(name, wanted)
        address = f"{request.scope['address']}{context.settings.root_path}"
        answers = await context.opening.run(_answers, context, name, wanted.objects, address)
    body = {"transfer": "basic", "hash_algo": "sha256", "objects": answers}
    return Response(json.dumps(body), media_type=LFS_TYPE)


@router.put(f"{_OBJECTS}/{{oid}}")
async def put_object(request: Request, context: ContextDep, name: str, oid: str) -> Response:
    """Keep the file that a link of `batch` is for, until a commit names it."""
    link, signature = _link_of(request, name, oid)
    await context.opening.run(lfs.check_link, context.store, link, signature)
    caller = request.app.state.authenticator.caller_of(link.key)
    request.scope["key"] = caller.log_id
    store = caller.context("write").store
    store.check_name(name)
    check_length(link.staged.size, context.limits.max_upload_bytes)
    with (
        Place(context.long) as place,
        store.new_file() as file,
        Reservation(context.spill) as reserved,
    ):
        await _receive(request, HashedUpload(file), link.staged, reserved, place)
        most_bytes = context.spill.total_bytes
        await context.opening.run(lfs.stage, store, file, link.staged, most_bytes)
    return Response()


def _check_batch(name: str, wanted: _Batch) -> None:
    """Raise an error unless it is an upload by the basic transfer."""
    if wanted.operation != "upload":
        raise errors.UnsupportedFeatureError(
            f"the operation is {wanted.operation[:40]!r}, but LFS only uploads here; download "
            f"/adapters/{name}/resolve/main/{MODEL_FILE}"
        )
    if "basic" not in wanted.transfers or wanted.hash_algo != "sha256":
        raise errors.InvalidRequestError(
            f"the transfers are {wanted.transfers[:8]} with {wanted.hash_algo[:40]!r}; offer "
            "'basic' with 'sha256'",
            field="transfers",
        )


def _answers(
    context: Context, name: str, wanted: Sequence[_Object], address: str
) -> list[dict[str, object]]:
    """Return what to do with each object: upload it, nothing, or the error that keeps it out."""
    present = context.store.staging(name).listed()
    answers: list[dict[str, object]] = []
    for one in wanted:
        about: dict[str, object] = {"oid": one.oid, "size": one.size}
        try:
            answers.append({**about, **_actions(context, name, one, present, address)})
        except _REFUSALS as error:
            code = int(status_of(type(error)))
            answers.append({**about, "error": {"code": code, "message": error.detail}})
    return answers


def _actions(
    context: Context, name: str, wanted: _Object, present: Sequence[Staged], address: str
) -> dict[str, object]:
    """Return the link to upload to; nothing if the object is there already."""
    check_length(wanted.size, context.limits.max_upload_bytes)
    staged = Staged(name, wanted.oid, wanted.size)
    link = lfs.new_link(context.store, staged, present, context.spill.total_bytes)
    if link is None:
        return {}
    href = f"{address}{_path_of(link, link.signature(context.store))}"
    action = {"href": href, "expires_in": LINK_SECONDS}
    return {"authenticated": True, "actions": {"upload": action}}


def _path_of(link: Link, signature: str) -> str:
    query = {
        "size": link.staged.size,
        "key": link.key,
        "expires": link.expires_at,
        "signature": signature,
    }
    path = _OBJECTS.format(name=link.staged.name)
    return f"{path}/{link.staged.sha256}?{urlencode(query)}"


def _link_of(request: Request, name: str, oid: str) -> tuple[Link, str]:
    """Return the link that a request is for, unchecked, and its signature."""
    query = request.query_params
    try:
        size, expires_at = (int(query[one]) for one in ("size", "expires"))
        return Link(Staged(name, oid, size), query["key"], expires_at), query["signature"]
    except (KeyError, ValueError):
        raise errors.LinkRefusedError(
            f"the link has no signature; request one from POST {BATCH_PATH}"
        ) from None


async def _receive(
    request: Request, upload: HashedUpload, staged: Staged, reserved: Reservation, place: Place
) -> None:
    """Write the body to `upload`; raises InvalidRequestError unless it is the file of the link.

    `reserved` and `place` are those of `receive_commit`, whose other errors this raises too.
    """
    check_not_compressed(request)
    if content_length(request) not in (None, staged.size):
        raise _wrong_file(staged, f"{content_length(request)} bytes")
    reserved.budget.check(staged.size)
    piece, received = bytearray(), 0
    async for chunk in body_parts(request, math.inf, place):
        received += len(chunk)
        if received > staged.size:
            raise _wrong_file(staged, "more")
        reserved.add(len(chunk))
        piece += chunk
        if len(piece) >= WRITE_BYTES:
            await write_weights(upload, piece)
            piece = bytearray()
    await write_weights(upload, piece)
    if received != staged.size or upload.sha256 != staged.sha256:
        raise _wrong_file(staged, f"{received} bytes with the SHA-256 {upload.sha256}")


def _wrong_file(staged: Staged, found: str) -> errors.InvalidRequestError:
    return errors.InvalidRequestError(
        f"the link is for a file of {staged.size} bytes with the SHA-256 {staged.sha256}, but the "
        f"body has {found}; send that file, or ask for a link for this one",
        field="body",
    )

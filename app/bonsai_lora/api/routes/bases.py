"""Base checkpoints, and merged files that are computed as they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from bonsai_lora import errors
from bonsai_lora.api import base_schemas
from bonsai_lora.api.context import Context
from bonsai_lora.api.deps import ContextDep, SetName
from bonsai_lora.api.merged_file import StreamedFile, gain_headers
from bonsai_lora.api.middleware import decode_slashes
from bonsai_lora.api.openapi import file_responses, problems
from bonsai_lora.api.query import Factor
from bonsai_lora.api.ranges import file_response
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering
from bonsai_lora.checkpoints.parts import MergedFile
from bonsai_lora.service.merged import weighted_sets

router = APIRouter(tags=["merged checkpoints"])

BaseName = Annotated[str, Path(description="name of a base checkpoint", examples=["tiny-qwen3"])]


@dataclass(frozen=True, slots=True)
class ModelQuery:
    """Which merged model a request is about."""

    base: BaseName
    name: SetName
    scale: Annotated[Factor, Query(description="weight of the set's delta")] = 1.0
    others: Annotated[
        list[str] | None, Query(alias="set", max_length=32, description="additional sets to merge")
    ] = None
    weights: Annotated[
        list[Factor] | None,
        Query(alias="weight", max_length=32, description="their weights, in order"),
    ] = None
    match: Annotated[
        str | None,
        Query(
            max_length=256,
            description="prefix of the tensor names that ambiguous module paths mean",
            examples=["model.language_model."],
        ),
    ] = None

    def model(self, context: Context) -> MergedModel:
        """Return the model; raises the errors of `weighted_sets` and `MergedModels.get`."""
        sets = weighted_sets(self.name, self.scale, self.others or [], self.weights or [])
        return context.models.get(context.store, self.base, sets, self.match)


@dataclass(frozen=True, slots=True)
class _FilesQuery(ModelQuery):
    """In which form the files of a merged model are wanted."""

    dtype: Annotated[
        Literal["F16", "BF16", "F32", "Q8_0"] | None,
        Query(
            description="type of the changed tensors of a GGUF base; default: F16 in the GGUF "
            "file, BF16 in the safetensors files, which cannot be Q8_0"
        ),
    ] = None
    widen: Annotated[
        Literal["all"] | None,
        Query(description="`all`: write all quantized tensors of the GGUF file in this type"),
    ] = None

    def files(self, context: Context) -> tuple[MergedModel, Mapping[str, MergedFile]]:
        """Return the model and its files; raises the errors of `model` and `merged_files`."""
        model = self.model(context)
        rendering = Rendering(self.dtype, is_widened=self.widen == "all")
        return model, context.models.files(model, rendering)


FilesQuery = Annotated[_FilesQuery, Depends()]

MERGE_ERRORS = (
    errors.BaseNotFoundError,
    errors.SetNotFoundError,
    errors.InvalidBaseError,
    errors.InvalidRequestError,
    errors.ShapeMismatchError,
    errors.UnsupportedAdapterError,
    errors.UnsupportedGgufError,
    errors.BaseChangedError,
    errors.BusyError,
)


@router.get(
    "/v1/bases",
    summary="List the base checkpoints",
    responses=problems(),
)
async def list_bases(context: ContextDep) -> base_schemas.BaseList:
    """Lists each GGUF model, and each folder with safetensors files or one GGUF model, under the
    setting `bases`. A new one is available immediately.
    """
    found, bad = [], {}
    for name in context.bases.names():
        try:
            found.append(await context.long.run(_info, context, name))
        except (errors.InvalidBaseError, errors.BaseChangedError) as error:
            bad[name] = error.detail
        except errors.BaseNotFoundError:
            continue
    return base_schemas.BaseList(bases=found, bad=bad)


@router.get(
    "/v1/bases/{base}",
    summary="Show a base checkpoint",
    responses=problems(errors.BaseNotFoundError, errors.InvalidBaseError),
)
async def get_base(context: ContextDep, base: BaseName) -> base_schemas.BaseInfo:
    """Returns the checkpoint's files, dtypes and parameter counts."""
    return await context.long.run(_info, context, base)


@router.get(
    "/v1/bases/{base}/merged/{set}",
    summary="List the files of a merged model",
    responses=problems(*MERGE_ERRORS),
)
async def list_merged_files(context: ContextDep, query: FilesQuery) -> base_schemas.MergedFiles:
    """Returns names, sizes and ETags. Nothing is computed. Of a GGUF base there are a merged GGUF
    file, named like the base, and the same model as a Hugging Face checkpoint.
    """
    _, files = await context.long.run(query.files, context)
    return base_schemas.MergedFiles(
        files=[
            base_schemas.MergedFileInfo(name=name, size_bytes=one.size_bytes, etag=one.etag)
            for name, one in files.items()
        ]
    )


@router.get(
    "/v1/bases/{base}/merged/{set}/{filename:path}",
    summary="Download a file of a merged model",
    response_class=Response,
    responses=file_responses("application/octet-stream", "Bonsai-Delta-Gain")
    | problems(*MERGE_ERRORS, errors.FileNotInModelError, errors.RangeNotSatisfiableError),
)
async def get_merged_file(
    request: Request,
    context: ContextDep,
    query: FilesQuery,
    filename: Annotated[
        str, Path(description="name of a listed file", examples=["model.safetensors"])
    ],
) -> Response:
    """The header, sizes and offsets of a safetensors file are those of the base's file. Each byte
    range is computed when it is requested, in float32, and rounded once, to nearest even. Once it
    is known, the header Bonsai-Delta-Gain says how much of the deltas this rounding leaves.
    """
    model, files = await context.long.run(query.files, context)
    filename = decode_slashes(filename)
    file = files.get(filename)
    if file is None:
        raise errors.FileNotInModelError(filename, list(files))
    streamed = StreamedFile(file, context.executor, context.settings.threads)
    headers = gain_headers(context.gains, model, filename, query.dtype)
    return file_response(request, streamed, context.long, headers)


def _info(context: Context, name: str) -> base_schemas.BaseInfo:
    base = context.bases.get(name)
    files = [
        base_schemas.BaseFile(name=file, size_bytes=opened.size_bytes)
        for file, opened in sorted(base.files.items())
    ]
    return base_schemas.BaseInfo(
        name=name,
        files=files,
        format=base.format,
        architecture=base.architecture,
        dtypes=dict(base.dtypes),
        parameter_count=base.parameter_count,
        ignored_files=list(base.ignored),
    )

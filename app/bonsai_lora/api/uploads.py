"""Multipart uploads, whose weights are written to a file as they arrive."""

from dataclasses import dataclass, field

import anyio.to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from bonsai_lora.api.body import body_parts, check_length, check_not_compressed, content_length
from bonsai_lora.errors import MalformedMultipartError, UnsupportedMediaTypeError
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import CONFIG_BYTES
from bonsai_lora.service.budget import Reservation
from bonsai_lora.service.work import Place
from bonsai_lora.storage.upload import Upload, WholeUpload

CONFIG_PART = "adapter_config"
MODEL_PART = "adapter_model"
GGUF_PART = "adapter_gguf"
_FILE_NAMES = {
    "adapter_config.json": CONFIG_PART,
    "adapter_model.safetensors": MODEL_PART,
    "adapter_model.bin": MODEL_PART,  # so that its content can be named
    "adapters.safetensors": MODEL_PART,
    "adapter.gguf": GGUF_PART,
}
"""Parts that are named after the file that they hold."""

_REMEDY = f"send the two files {CONFIG_PART} and {MODEL_PART}, or {GGUF_PART} alone"
WRITE_BYTES = 1 << 20


async def receive_adapter(
    request: Request,
    upload: Upload,
    gguf: WholeUpload,
    limit: int,
    reserved: Reservation,
    place: Place,
) -> bytes | None:
    """Write the part `adapter_model` to `upload`; return the part `adapter_config`.

    The part `adapter_gguf` is written to `gguf` instead, and None returned.

    `reserved` counts bytes before they are written; `place` is taken as in `read_body`. Raises
    their errors, UnsupportedMediaTypeError, BodyTooLargeError, the errors of `Upload.write`, and
    MalformedMultipartError for a missing, duplicate or unknown part.
    """
    check_not_compressed(request)
    declared = content_length(request)
    if declared is not None:
        check_length(declared, limit)
        reserved.budget.check(declared)
    form = _AdapterForm()
    boundary = _boundary(request)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        async for chunk in body_parts(request, limit, place):
            reserved.add(len(chunk))
            parser.write(chunk)
            if len(form.model) >= WRITE_BYTES:
                await _flush(form, gguf if form.is_gguf else upload)
        parser.finalize()
    except FormParserError as error:
        raise MalformedMultipartError(
            f"the body is not multipart/form-data: {error}; {_REMEDY}"
        ) from None
    await _flush(form, gguf if form.is_gguf else upload)
    missing = set() if form.is_gguf else {CONFIG_PART, MODEL_PART} - form.seen
    if missing or not form.ended:
        what = f"part {min(missing)!r}" if missing else "closing boundary"
        raise MalformedMultipartError(
            f"the form has no {what}; {_REMEDY}",
            expected=[CONFIG_PART, MODEL_PART],
            got=sorted(form.seen),
        )
    if form.is_gguf:
        return None
    check_config_start(form.config)
    return bytes(form.config)


def _boundary(request: Request) -> bytes:
    header = request.headers.get("content-type", "")
    media, options = parse_options_header(header)
    if media != b"multipart/form-data" or not options.get(b"boundary"):
        fault = f"Content-Type is {header[:100]!r}" if header else "the request has no Content-Type"
        remedy = (
            "remove the header, which the HTTP library then writes with a boundary"
            if media == b"multipart/form-data"
            else f"send an adapter as multipart/form-data (with curl, -F {CONFIG_PART}=@"
            f"adapter_config.json -F {MODEL_PART}=@adapter_model.safetensors)"
        )
        raise UnsupportedMediaTypeError(
            f"{fault}; {remedy}",
            got=header[:100],
            expected=["multipart/form-data"],
        )
    return options[b"boundary"]


async def _flush(form: "_AdapterForm", upload: Upload | WholeUpload) -> None:
    model, form.model = form.model, bytearray()
    await write_weights(upload, model)


async def write_weights(upload: Upload | WholeUpload, piece: bytearray) -> None:
    """Write the next piece of a file to `upload`, if there is one; raises its errors."""
    if piece:
        await anyio.to_thread.run_sync(upload.write, piece)


@dataclass
class _AdapterForm:
    """The parser's callbacks and what they have collected."""

    config: bytearray = field(default_factory=bytearray)
    model: bytearray = field(default_factory=bytearray)
    seen: set[str] = field(default_factory=set)
    ended: bool = False
    is_gguf: bool = False
    _name: str = ""
    _header_name: bytearray = field(default_factory=bytearray)
    _header_value: bytearray = field(default_factory=bytearray)

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._name = ""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            name = options.get(b"name", b"").decode("utf-8", "replace")
            self._name = _FILE_NAMES.get(name, name)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        problem = self._problem()
        if problem:
            raise MalformedMultipartError(
                f"the part {self._name[:100]!r} {problem}; {_REMEDY}",
                got=self._name[:100],
                expected=[CONFIG_PART, MODEL_PART],
            )
        self.seen.add(self._name)
        self.is_gguf = self._name == GGUF_PART

    def _problem(self) -> str:
        """Return what is wrong with the part that starts; empty if nothing is."""
        if self._name not in (CONFIG_PART, MODEL_PART, GGUF_PART):
            return "is unknown"
        if self._name in self.seen:
            return "is given twice"
        if self.seen and GGUF_PART in (self._name, *self.seen):
            return f"is given beside {min(self.seen)}"
        return ""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name in (MODEL_PART, GGUF_PART):
            self.model += data[start:end]
            return
        self.config += data[start:end]
        check_length(len(self.config), CONFIG_BYTES)

    def _on_end(self) -> None:
        self.ended = True

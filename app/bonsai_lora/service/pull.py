"""Make sets from adapters in the operator's origins."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from bonsai_lora.errors import BusyError
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import CONFIG_BYTES, CONFIG_FILE, MODEL_FILE
from bonsai_lora.service.budget import Budget, Reservation
from bonsai_lora.service.sets import AS_SENT, Imported, ImportOptions, Precondition, import_adapter
from bonsai_lora.service.view import SetView
from bonsai_lora.sources import folder, web
from bonsai_lora.sources.origins import Origin, Reference, find
from bonsai_lora.sources.web import Sink
from bonsai_lora.storage.setfile import Source
from bonsai_lora.storage.upload import Upload

_PULLS = 2
"""Most pulls at a time, in one process."""


@dataclass(frozen=True, slots=True)
class Origins:
    """The operator's origins, and the places for pulls from them."""

    by_name: Mapping[str, Origin]
    stall_seconds: float
    disk: Budget
    """Counts the bytes of pulls before they are written."""
    _places: threading.BoundedSemaphore = field(
        default_factory=partial(threading.BoundedSemaphore, _PULLS)
    )

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold one of the places for pulls; raises BusyError."""
        if not self._places.acquire(blocking=False):
            raise BusyError(
                f"{_PULLS} pulls are in progress, which is the limit; retry in a second"
            )
        try:
            yield
        finally:
            self._places.release()


def pull_set(
    store: SetView,
    origins: Origins,
    name: str,
    reference: str,
    precondition: Precondition,
    options: ImportOptions = AS_SENT,
) -> Imported:
    """Create or replace a set from an adapter in an origin: of one commit, if the origin has them.

    If the stored version came from the same one, or the same files, nothing changes. Raises the
    errors of `find`, `web.fetch`, `s3.pin`, `folder.read` and `import_adapter`, BusyError, and then
    changes nothing.
    """
    store.check_name(name)
    found = find(origins.by_name, reference)
    with origins.place():
        pinned = _pin(origins, found)
        present = store.find_record(name)
        source = None if present is None else present.source
        reference = pinned.at(pinned.revision)
        if pinned.revision is not None and source is not None and source.reference == reference:
            precondition(present)
            return Imported.unchanged(store.read(name))
        with store.new_file() as file, Reservation(origins.disk) as reserved:
            upload = Upload(file, store.limits.max_header_bytes)
            limit = store.limits.max_upload_bytes
            config, digest = _receive(origins, pinned, upload, limit, reserved)
            source = Source(reference, digest)
            return import_adapter(store, name, config, upload, precondition, options, source)


def _pin(origins: Origins, found: Reference) -> Reference:
    """Return the reference with the commit or revision that it means now, if its origin has one."""
    if found.origin.kind == "s3":
        from bonsai_lora.sources import s3  # noqa: PLC0415 - optional

        return s3.pin(found, (CONFIG_FILE, MODEL_FILE), origins.stall_seconds)
    if found.origin.kind != "hub":
        return found
    revision = found.revision or "main"
    commit = web.commit_of(found.origin, found.path, revision, origins.stall_seconds)
    return Reference(found.origin, found.path, commit)


def _receive(
    origins: Origins, pinned: Reference, upload: Upload, limit: int, reserved: Reservation
) -> tuple[bytes, str]:
    """Write the weights to `upload`; return the configuration, and the digest of both files."""
    config, digests = bytearray(), {CONFIG_FILE: hashlib.sha256(), MODEL_FILE: hashlib.sha256()}

    def keep_config(piece: bytes) -> None:
        digests[CONFIG_FILE].update(piece)
        config.extend(piece)

    def keep_weights(piece: bytes) -> None:
        reserved.add(len(piece))
        digests[MODEL_FILE].update(piece)
        upload.write(piece)

    _get(origins, pinned, CONFIG_FILE, keep_config, CONFIG_BYTES)
    check_config_start(config)
    _get(origins, pinned, MODEL_FILE, keep_weights, limit)
    whole = "".join(f"{name} {digest.hexdigest()}\n" for name, digest in digests.items())
    return bytes(config), hashlib.sha256(whole.encode()).hexdigest()


def _get(origins: Origins, pinned: Reference, file: str, sink: Sink, limit: int) -> None:
    origin = pinned.origin
    if origin.kind == "file":
        folder.read(origin, f"{pinned.path}/{file}", sink, limit)
        return
    if origin.kind == "s3":
        from bonsai_lora.sources import s3  # noqa: PLC0415 - optional

        s3.read(pinned, file, sink, limit, origins.stall_seconds)
        return
    inner = f"/resolve/{pinned.revision}" if origin.kind == "hub" else ""
    url = f"{origin.url}/{pinned.path}{inner}/{file}"
    web.fetch(origin, url, sink, limit, origins.stall_seconds)

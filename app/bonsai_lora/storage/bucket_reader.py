"""Read sets of a bucket: copies on this machine, as fresh as is promised."""

import contextlib
import time
from collections import defaultdict
from functools import partial

from bonsai_lora.errors import (
    MalformedSafetensorsError,
    SetNotFoundError,
    StoreUnreachableError,
)
from bonsai_lora.formats.names import is_set_name
from bonsai_lora.storage.bucket import Bucket, Found, SameError
from bonsai_lora.storage.cache import Cache, Note, receive_blob
from bonsai_lora.storage.disk import storage_errors
from bonsai_lora.storage.freshness import Look, Looks
from bonsai_lora.storage.pointer import (
    POINTERS,
    MalformedPointerError,
    Pointer,
    decode_pointer,
)
from bonsai_lora.storage.setfile import SetRecord

_TRIES = 3


class BucketReader:
    """Keeps `cache` as fresh as `looks` promises. Thread-safe."""

    def __init__(self, bucket: Bucket, cache: Cache, looks: Looks) -> None:
        self._bucket = bucket
        self._cache = cache
        self._files = cache.files
        self._looks = looks
        self.bad: dict[str, str] = {}
        """Why the pointer or blob of a set cannot be used, by name."""
        self.counts: defaultdict[str, float] = defaultdict(float)
        """Totals: hits, fetches, fetched_bytes and fetch_seconds."""

    def look_up(self, name: str) -> Look:
        """Make sure that the copy of a set may be acted on; raises SetNotFoundError."""
        if not is_set_name(name):
            raise SetNotFoundError(name)
        look = self._fresh(name)
        if look is None:
            look = self._looks.once(name, time.monotonic(), partial(self._look_unless_known, name))
        if not look.exists:
            raise SetNotFoundError(name)
        return look

    def read_record(self, name: str) -> SetRecord:
        """Return the record in the bucket's pointer to a set; raises SetNotFoundError."""
        found = self._bucket.get(f"{POINTERS}/{name}") if is_set_name(name) else None
        record = None if found is None else self.decode(name, found).record
        if record is None:
            raise SetNotFoundError(name)
        return record

    def refresh(self, name: str) -> None:
        """Compare the pointer of a set with the bucket's now, and fetch the set if it changed."""
        if not is_set_name(name):
            return
        with contextlib.suppress(SetNotFoundError):
            last = self._last_look(name)
            self._looks.once(name, time.monotonic(), partial(self._look, name, last))

    def _fresh(self, name: str) -> Look | None:
        """Return the last look of this process at a set if it may be acted on."""
        look = self._looks.fresh(name, time.monotonic())
        if look is not None and not look.exists and self._cache.has(name):
            return None  # a different worker has created it meanwhile
        return look

    def _look_unless_known(self, name: str) -> Look:
        """Compare the pointer with the bucket's, unless somebody else just did or it is away."""
        fresh = self._fresh(name)
        if fresh is not None:
            return fresh
        last = self._last_look(name)
        if last is not None and time.monotonic() < last.until and not last.is_stale:
            return self._looks.note(name, last)
        usable = None if self._bucket.is_reachable else self._looks.usable(name, last)
        return usable or self._look(name, last)

    def _look(self, name: str, last: Look | None) -> Look:
        """Compare the pointer with the bucket's; `last` is the last look, if there is a copy."""
        try:
            if last is None or last.found is None:
                return self.settle(name)
            at, wall = time.monotonic(), time.time()
            try:
                self._bucket.get(f"{POINTERS}/{name}", unless=last.found.etag)
            except SameError:
                self._looks.counts["same"] += 1
                self._cache.touch(name, wall)
                return self._looks.note(name, self._looks.new(last.found, exists=True, at=at))
            return self.settle(name)
        except StoreUnreachableError as error:
            return self._looks.fail(name, last, error)

    def _last_look(self, name: str) -> Look | None:
        """Return the youngest look at a set that has a copy, of this process or of its note."""
        if not self._cache.has(name):
            return None
        known, note = self._looks.get(name), self._cache.note(name)
        if note is None:
            return known if known is not None and known.exists else None
        age = time.time() - note.checked
        if age < 0:  # the clock was set back
            age = float("inf")
        noted = self._looks.new(note.found, exists=True, at=time.monotonic() - age)
        return known if known is not None and known.exists and known.at > noted.at else noted

    def settle(self, name: str) -> Look:
        """Make the copy of a set what the pointer says; fetch it if it is a different version.

        Raises StoreUnreachableError also if the blob is missing: an older copy goes on then.
        """
        with storage_errors(), self._cache.settling(name):
            for _ in range(_TRIES):
                at, wall = time.monotonic(), time.time()
                found = self._bucket.get(f"{POINTERS}/{name}")
                pointer = None if found is None else self.decode(name, found)
                if found is None or pointer is None or pointer.record is None:
                    self._cache.drop(name)
                    self._looks.counts["gone"] += 1
                    return self._looks.note(name, self._looks.new(found, exists=False, at=at))
                try:
                    self._bring(name, pointer, Note(found, wall))
                except FileNotFoundError:  # replaced meanwhile, and its blob removed
                    continue
                except (MalformedPointerError, MalformedSafetensorsError) as error:
                    return self._refuse(name, getattr(error, "detail", str(error)), at)
                self.bad.pop(name, None)
                return self._looks.note(name, self._looks.new(found, exists=True, at=at))
            self.bad[name] = "the blob that its pointer names is missing"
            raise StoreUnreachableError(
                f"the bucket has a pointer for set {name!r}, but not its content, which "
                "may be on its way from a different region; retry later",
                set=name,
            )

    def _bring(self, name: str, pointer: Pointer, note: Note) -> None:
        """Put the blob of a pointer in place, unless the copy is that already."""
        self._looks.counts["changed"] += 1
        if self._cache.record(name) == pointer.record:
            self._cache.put_note(name, note)
            return
        started = time.monotonic()
        self._cache.make_room(pointer.size)
        with self._files.new_file() as file:
            receive_blob(file, self._bucket.pieces(pointer.blob, pointer.size), pointer)
            self._cache.install(name, file, note)
        self.counts["fetches"] += 1
        self.counts["fetched_bytes"] += pointer.size
        self.counts["fetch_seconds"] += time.monotonic() - started

    def decode(self, name: str, found: Found) -> Pointer:
        """Return a pointer; raises SetNotFoundError for one that cannot be used."""
        try:
            return decode_pointer(name, found.body)
        except MalformedPointerError as error:
            self.bad[name] = f"its pointer is malformed: {error}"
            raise SetNotFoundError(name) from None

    def _refuse(self, name: str, reason: str, at: float) -> Look:
        """Return that there is no set, as its blob is not what the pointer says."""
        self.bad[name] = reason
        return self._looks.note(name, self._looks.new(None, exists=False, at=at))

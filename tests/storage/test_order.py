"""What is on the disk when: a write is acknowledged when no loss of power can take it back.

The system's calls are recorded, and played to a disk that keeps only what was synced: a file's
bytes at its last fsync, a folder's entries at its own. At every step, each state in which that disk
could be found is laid out in a fresh folder and opened.
"""

import itertools
import os
import stat
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import assert_problem, peft_config, peft_tensors, serving, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.errors import SetNotFoundError
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings
from bonsai_lora.storage.store import SetStore

ENTRY = "s.safetensors"
CHANGING = ("rename", "replace", "link", "unlink", "remove")


class Disk:
    """Records the calls of `os` that decide what is on a disk; for one folder of sets."""

    def __init__(self, folder):
        self.folder = folder
        self.calls = []
        self.synced = {}
        """Inode -> its bytes at its last fsync."""
        self.entries = self._entries()
        """Name -> inode, at the last fsync of the folder."""
        self.pending = []
        """Entries as changed since, one after the other: (name, inode or None)."""
        self.steps = []
        for inode in self.entries.values():
            self.synced[inode] = self._bytes()[inode]
        self.note("start")

    def _entries(self):
        return {path.name: path.stat().st_ino for path in self.folder.iterdir()}

    def _bytes(self):
        return {path.stat().st_ino: path.read_bytes() for path in self.folder.iterdir()}

    def note(self, call):
        """Keep what the disk may hold after this call."""
        self.calls.append(call)
        self.steps.append((call, dict(self.entries), list(self.pending), self._contents()))

    def _contents(self):
        """Inode -> every content that may be found in it."""
        now = self._bytes()
        found = {}
        for inode in self.synced.keys() | now.keys():
            kept, current = self.synced.get(inode, b""), now.get(inode)
            found[inode] = {kept}
            if current is not None and current != kept:
                found[inode] |= {current, current[: len(current) // 2], bytes(len(current))}
        return found

    def fsync(self, real, descriptor):
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            time.sleep(0.02)  # an answer that does not wait for it would come first
        real(descriptor)
        if not stat.S_ISDIR(status.st_mode):
            self.synced[status.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self.note("fsync file")
        elif os.path.samestat(status, self.folder.stat()):
            self.entries, self.pending = self._entries(), []
            self.note("fsync folder")

    def changing(self, name, real, *paths, **options):
        before = self._entries()
        result = real(*paths, **options)
        now = self._entries()
        changed = [one for one in before.keys() | now.keys() if before.get(one) != now.get(one)]
        for one in changed:
            self.pending.append((one, now.get(one)))
        if changed:
            self.note("unlink" if name in ("unlink", "remove") else "rename")
        return result

    def states(self):
        """Every state in which the disk may be found: (call, is last, name -> bytes)."""
        for number, (call, entries, pending, contents) in enumerate(self.steps):
            for kept in itertools.product((False, True), repeat=len(pending)):
                names = dict(entries)
                for (name, inode), happened in zip(pending, kept, strict=True):
                    if happened and inode is None:
                        names.pop(name, None)
                    elif happened:
                        names[name] = inode
                for some in itertools.product(*(contents[inode] for inode in names.values())):
                    found = dict(zip(names, some, strict=True))
                    yield call, number == len(self.steps) - 1, found


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A client; and a function that makes a call and gives the disk that saw it."""
    app = create_app(Settings(store=str(tmp_path / "store")))

    def record(call):
        disk = Disk(tmp_path / "store" / "sets")
        with monkeypatch.context() as patch:
            for name in ("fsync", "fdatasync"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda fd, real=real: disk.fsync(real, fd))
            for name in CHANGING:
                real = getattr(os, name)
                patch.setattr(
                    os,
                    name,
                    lambda *paths, name=name, real=real, **more: disk.changing(
                        name, real, *paths, **more
                    ),
                )
            answer = call()
        disk.note("answer")
        return answer, disk

    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, record


def put_weights(client):
    tensors = {"lora_A": np.ones((2, 6), np.float32), "lora_B": np.ones((5, 2), np.float32)}
    headers = {"Content-Type": "application/vnd.safetensors"}
    path = "/v1/sets/s/adapters/q_proj"
    return client.put(path, content=safetensors.encode(tensors), headers=headers)


def put_upload(client):
    return upload_parts(client, "s", peft_config(), peft_tensors(np.random.default_rng(1)))


def put_many(client):
    """An upload whose header does not fit before its data, so that it is written twice."""
    config = peft_config(auto_mapping={"filler": "x" * 200_000})
    return upload_parts(client, "s", config, peft_tensors(np.random.default_rng(2)))


def put_new(client):
    return client.put("/v1/sets/s/adapters/k_proj", json={"d_in": 6, "d_out": 5})


def create(client):
    attention = {"hidden_size": 8, "num_heads": 2}
    return client.post("/v1/sets", json={"name": "s", "attention": attention})


CHANGES = {
    "create": (None, create),
    "upload": (None, put_upload),
    "upload with a long header": (None, put_many),
    "upload over a set": (create, put_upload),
    "new module": (create, put_new),
    "weights of a module": (create, put_weights),
    "delete a module": (create, lambda client: client.delete("/v1/sets/s/adapters/q_proj")),
    "delete": (create, lambda client: client.delete("/v1/sets/s")),
}
WRITTEN = ["start", "fsync file", "rename", "fsync folder", "answer"]
DELETED = ["start", "unlink", "fsync folder", "answer"]


@pytest.mark.parametrize("name", CHANGES)
def test_the_order_of_a_change(recorded, name):
    client, record = recorded
    before, change = CHANGES[name]
    if before is not None:
        assert before(client).is_success
    answer, disk = record(lambda: change(client))
    assert answer.is_success, answer.text
    assert disk.calls == (DELETED if name == "delete" else WRITTEN)
    path = disk.folder / ENTRY
    if path.exists():  # nothing was written behind its fsync
        assert disk.synced[path.stat().st_ino] == path.read_bytes()


def opened(folder, files):
    """The version of `s` in a store whose disk was found like that, and its bytes."""
    sets = folder / "sets"
    sets.mkdir(parents=True)
    for name, content in files.items():
        (sets / name).write_bytes(content)
    store = SetStore(folder)
    try:
        stored = store.read("s")
    except SetNotFoundError:
        found = None
    else:
        found = (stored.record.version, bytes(stored.file))
    assert store.bad.reasons() == {}
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_loss_of_power_at_any_step_leaves_the_old_or_the_new(recorded, tmp_path, name):
    client, record = recorded
    before, change = CHANGES[name]
    path, old = tmp_path / "store" / "sets" / ENTRY, None
    if before is not None:
        old = (before(client).json()["version"], path.read_bytes())
    answer, disk = record(lambda: change(client))
    assert answer.is_success, answer.text
    new = None
    if path.exists():
        new = (1 if old is None else old[0] + 1, path.read_bytes())
    assert new != old
    seen = set()
    for number, (call, is_last, files) in enumerate(disk.states()):
        found = opened(tmp_path / "after" / str(number), files)
        assert found in (old, new), call
        assert not is_last or found == new, "what was acknowledged is gone"
        seen.add(found)
    assert seen == {old, new}


@pytest.mark.parametrize(
    "change",
    [
        create,
        lambda client: client.delete("/v1/sets/s", headers={"If-Match": '"x"'}),
        lambda client: client.delete("/v1/sets/s/adapters/none"),
        lambda client: upload_parts(client, "s", peft_config(r=3), peft_tensors(np.random)),
        lambda client: client.put("/v1/sets/s/adapters/q_proj", json={"d_in": -1}),
    ],
)
def test_a_refusal_touches_no_entry(recorded, change):
    client, record = recorded
    assert create(client).status_code == 201
    answer, disk = record(lambda: change(client))
    assert 400 <= answer.status_code < 500
    assert disk.calls == ["start", "answer"]
    if answer.status_code == 409:
        assert_problem(answer, 409, "set_exists")


@pytest.mark.parametrize(
    ("content", "age", "is_locked", "stays"),
    [
        (b"", 0, False, True),  # made a moment ago, and not locked yet
        (b"", 3600, False, False),
        (b"x", 0, False, False),
        (b"x", 3600, False, False),
        (b"", 0, True, True),
        (b"", 3600, True, True),
        (b"x", 0, True, True),
        (b"x", 3600, True, True),
    ],
)
def test_temporary_files_go_when_nobody_has_them(tmp_path, content, age, is_locked, stays):
    store = SetStore(tmp_path)
    then = time.time() - age
    if is_locked:
        with store.new_file() as file:
            file.write(content)
            file.flush()
            os.utime(file.name, (then, then))
            SetStore(tmp_path)
            assert Path(file.name).exists() == stays
        assert not Path(file.name).exists()
        return
    path = store.temporary / "0123456789abcdef"
    path.write_bytes(content)
    os.utime(path, (then, then))
    SetStore(tmp_path)
    assert path.exists() == stays

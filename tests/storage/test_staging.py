"""Uploads that wait for their commits: in a folder of two workers, and in a bucket of two machines."""

import errno
import os
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from buckets import Machines
from test_index import write

from bonsai_lora.cli.main import main
from bonsai_lora.errors import StoreFullError
from bonsai_lora.storage import staging
from bonsai_lora.storage.bucket_gc import collect
from bonsai_lora.storage.staging import Staged
from bonsai_lora.storage.store import SetStore

DAY = timedelta(days=1)
ONE = Staged("acme.one", "1" * 64, 3_000_000)


def allowed(_):
    """Let everything be staged."""


@pytest.fixture(params=["folder", "bucket"])
def stores(request, tmp_path):
    """Two workers of a folder, or two machines of a bucket."""
    if request.param == "folder":
        return [SetStore(tmp_path / "store") for _ in range(2)]
    machines = Machines(tmp_path)
    return [machines.store(name) for name in ("one", "two")]


def add(store, staged=ONE, check=allowed):
    content = os.urandom(staged.size)
    with store.new_file() as file:
        file.write(content)
        store.staging.add(file, staged, check)
    return content


def read(store, staged=ONE):
    return b"".join(store.staging.pieces(staged))


def test_what_one_adds_all_find(stores):
    first, second = stores
    assert first.staging.listed() == []
    content = add(first)
    assert second.staging.listed() == [ONE]
    assert read(second) == content
    small = Staged("b", "2" * 64, 5)
    assert add(second, small) == read(first, small)
    again = add(second)
    assert read(first) == again
    assert sorted(first.staging.listed(), key=lambda one: one.name) == [ONE, small]
    second.staging.remove(ONE)
    second.staging.remove(ONE)
    assert first.staging.listed() == [small]
    with pytest.raises(FileNotFoundError):
        read(first)
    assert not list(first.temporary.iterdir())


def test_a_file_of_a_different_length_is_not_read(stores):
    add(stores[0])
    shorter = Staged(ONE.name, ONE.sha256, ONE.size - 1)
    assert read(stores[1], shorter) == b""


def test_a_refused_file_leaves_nothing(stores):
    first, second = stores
    add(first)

    def check(present):
        assert list(present) == [ONE]
        raise StoreFullError("no")

    with pytest.raises(StoreFullError):
        add(second, Staged("b", "2" * 64, 5), check)
    assert first.staging.listed() == [ONE]
    assert not list(second.temporary.iterdir())


def test_all_have_one_secret_whoever_needs_it_first(stores):
    found, start = [], threading.Barrier(2)

    def ask(store):
        start.wait()
        found.append(store.staging.secret())

    threads = [threading.Thread(target=ask, args=(store,)) for store in stores]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(set(found)) == 1
    assert len(found[0]) == 32
    assert stores[0].staging.listed() == []


def test_a_secret_that_is_not_one_signs_nothing(tmp_path):
    machines = Machines(tmp_path)
    bucket = machines.store("one")
    bucket.line.put("staged/secret", b"", replaces=None)
    folder = SetStore(tmp_path / "store")
    folder.staging.secret()
    (folder.root / "staged" / "secret").write_bytes(b"")
    for store in (bucket, folder):
        with pytest.raises(ValueError, match="has 0 bytes"):
            store.staging.secret()


def test_files_of_a_folder_go_after_a_day_and_nothing_else_does(tmp_path, capsys):
    store = SetStore(tmp_path)
    write(store, "mine")
    secret = store.staging.secret()
    old, new = ONE, Staged("b", "2" * 64, 5)
    for one in (old, new):
        add(store, one)
    (tmp_path / "staged" / "notes").write_text("the operator's")
    for name in ("secret", "notes", old.key):
        os.utime(tmp_path / "staged" / name, (1, 1))
    store.maintain()
    assert store.staging.listed() == [new]
    os.utime(tmp_path / "staged" / new.key, (1, 1))
    assert main(["gc", "--store", str(tmp_path)]) == 0
    assert "1 upload without a commit removed" in capsys.readouterr().out
    assert main(["gc", "--store", str(tmp_path)]) == 0
    assert sorted(path.name for path in (tmp_path / "staged").iterdir()) == ["notes", "secret"]
    assert store.staging.secret() == secret
    assert [one.name for one in store.records()] == ["mine"]


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path, monkeypatch):
    """A folder under the name of a file, and all of a store that has become read-only."""
    store = SetStore(tmp_path)
    (tmp_path / "staged").mkdir()
    in_the_way = tmp_path / "staged" / f"{'0' * 64}.folder"
    in_the_way.mkdir()
    add(store)
    for path in (tmp_path / "staged").iterdir():
        os.utime(path, (1, 1))

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        store.maintain()
    assert store.staging.listed() == [ONE]
    assert store.staging.expire() == 1
    assert store.staging.listed() == []
    assert in_the_way.is_dir()


def test_objects_of_a_bucket_go_after_a_day_by_its_clock(tmp_path, monkeypatch):
    machines = Machines(tmp_path)
    first, second = machines.store("one"), machines.store("two")
    secret = first.staging.secret()
    add(first)
    assert second.staging.expire() == 0
    with second.new_file() as file:
        assert collect(second.line, file, DAY).staged == 0
    monkeypatch.setattr(second.line, "now", lambda: datetime.now(UTC) + DAY + timedelta(minutes=1))
    with second.new_file() as file:
        assert collect(second.line, file, DAY).staged == 1
    assert first.staging.listed() == []
    assert machines.store("three").staging.secret() == secret


def test_a_service_over_a_bucket_looks_for_old_ones_each_hour(tmp_path, monkeypatch):
    store = Machines(tmp_path).store()
    add(store)
    monkeypatch.setattr(store.line, "now", lambda: datetime.now(UTC) + 2 * DAY)
    store.maintain()
    assert store.staging.listed() == [ONE]
    later = time.monotonic() + 3601
    monkeypatch.setattr(time, "monotonic", lambda: later)
    store.maintain()
    assert store.staging.listed() == []
    store.line.is_cut = True
    later += 3601
    store.maintain()


def test_a_backup_has_nothing_of_it_and_it_is_not_called_dropped(tmp_path, capsys):
    store = SetStore(tmp_path / "store")
    write(store, "mine")
    store.staging.secret()
    add(store, Staged("x.safetensors", "3" * 64, 5))
    assert store.dropped().count == 0
    assert main(["backup", str(tmp_path / "backup"), "--store", str(store.root)]) == 0
    names = sorted(path.name for path in (tmp_path / "backup").rglob("*") if path.is_file())
    assert names == ["listing.json", "mine.safetensors"]
    capsys.readouterr()


def test_a_crash_leaves_no_part_of_a_file_or_secret(tmp_path, monkeypatch):
    store = SetStore(tmp_path)

    def crash(*_):
        raise KeyboardInterrupt

    for name in ("rename", "link"):
        monkeypatch.setattr(staging.os, name, crash)
    with pytest.raises(KeyboardInterrupt):
        store.staging.secret()
    with pytest.raises(KeyboardInterrupt):
        add(store)
    monkeypatch.undo()
    assert list((tmp_path / "staged").iterdir()) == []
    assert list(store.temporary.iterdir()) == []
    assert len(store.staging.secret()) == 32


def test_only_the_owner_can_read_what_waits(tmp_path):
    store = SetStore(tmp_path)
    add(store)
    store.staging.secret()
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (tmp_path / "staged", tmp_path / "staged" / "secret")
    }
    assert modes == {"staged": 0o700, "secret": 0o600}

"""Backups of a store that is in use, and what a restore makes of them."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from test_index import assert_agrees, delete, in_files, write

from bonsai_lora.cli.main import main
from bonsai_lora.storage.store import SetStore


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "sets").iterdir()}


@pytest.fixture(params=["links", "copies"])
def way(request, monkeypatch):
    if request.param == "copies":
        real = Path.rename

        def rename(path, target):
            if path.name.startswith("backup-"):  # as between two file systems
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return real(path, target)

        monkeypatch.setattr(Path, "rename", rename)
    return request.param


def test_a_backup_of_a_store_in_use_is_of_one_moment(tmp_path, way, capsys):
    """The writer keeps two sets equal in version, one after the other, and deletes in order."""
    root = tmp_path / "store"
    store, is_over = SetStore(root), threading.Event()
    for name in ("a", "b", "c"):
        write(store, name)

    def change():
        number = 0
        while not is_over.is_set():
            write(store, "a", rank=1 + number % 3)
            write(store, "b", rank=1 + number % 3)
            write(store, f"n{number}")
            if number:
                delete(store, f"n{number - 1}")
            number += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(8):
            target = tmp_path / f"backup-{number}"
            assert main(["backup", str(target), "--store", str(root)]) == 0
            time.sleep(0.01)
    finally:
        is_over.set()
        thread.join()
    assert list((root / "tmp").iterdir()) == []
    assert "sets, " in capsys.readouterr().out
    for number in range(8):
        target, again = tmp_path / f"backup-{number}", tmp_path / f"restored-{number}"
        versions = {one.name: one.version for one in in_files(target)}
        assert 0 <= versions["a"] - versions["b"] <= 1
        assert versions["c"] == 1
        assert len(versions) <= 5  # never three of n0, n1, …
        listed = json.loads((target / "listing.json").read_text())["sets"]
        assert {one["name"]: one["bytes"] for one in listed} == {
            name.removesuffix(".safetensors"): len(one) for name, one in contents(target).items()
        }
        assert main(["restore", str(target), "--store", str(again)]) == 0
        assert contents(again) == contents(target)
        assert_agrees(SetStore(again))


def test_a_backup_does_not_change_with_the_store(tmp_path, way):
    store = SetStore(tmp_path / "store")
    for name in ("a", "b"):
        write(store, name)
    before = contents(store.root)
    stat = os.stat(store.root / "sets" / "a.safetensors")
    assert main(["backup", str(tmp_path / "to"), "--store", str(store.root)]) == 0
    linked = os.path.samestat(os.stat(tmp_path / "to" / "sets" / "a.safetensors"), stat)
    assert linked == (way == "links")
    write(store, "a", rank=3)
    delete(store, "b")
    assert contents(tmp_path / "to") == before
    assert_agrees(store)


def test_a_backup_goes_into_a_new_folder_only(tmp_path, capsys):
    store = SetStore(tmp_path / "store")
    write(store, "a")
    (tmp_path / "to").mkdir()
    assert main(["backup", str(tmp_path / "to"), "--store", str(store.root)]) == 2
    assert f"{tmp_path / 'to'} exists already; name a new folder" in capsys.readouterr().err
    assert list((tmp_path / "to").iterdir()) == []
    assert main(["backup", str(tmp_path / "new"), "--store", str(tmp_path)]) == 2
    assert not (tmp_path / "new").exists()
    assert "there is no store at" in capsys.readouterr().err


def test_a_restore_replaces_nothing_and_can_be_continued(tmp_path, capsys):
    store, again = SetStore(tmp_path / "store"), SetStore(tmp_path / "again")
    for name in ("a", "b", "c", "d", "e"):
        write(store, name)
    target = tmp_path / "to"
    assert main(["backup", str(target), "--store", str(store.root)]) == 0
    write(again, "a", rank=2)
    path = target / "sets" / "b.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (target / "sets" / "c.safetensors").unlink()
    os.truncate(target / "sets" / "d.safetensors", 100)
    assert main(["restore", str(target), "--store", str(again.root)]) == 1
    said = capsys.readouterr().err
    assert [line.partition(":")[0] for line in said.splitlines()] == ["a", "b", "c", "d"]
    assert "a different set named 'a' exists" in said
    assert "is damaged" in said
    assert sorted(one.name for one in again.records()) == ["a", "e"]
    assert again.read("a").lora_set.registry.get("m").rank == 2
    assert list((again.root / "tmp").iterdir()) == []
    path.write_bytes(content)
    before = os.stat(again.root / "sets" / "e.safetensors")
    assert main(["restore", str(target), "--store", str(again.root)]) == 1
    assert sorted(one.name for one in again.records()) == ["a", "b", "e"]
    assert os.path.samestat(before, os.stat(again.root / "sets" / "e.safetensors"))
    assert_agrees(again)


@pytest.mark.parametrize(
    "listing", ["", "[]", '{"format": 2, "sets": []}', '{"format": 1, "sets": [{"name": "../x", "bytes": 1}]}']
)  # fmt: skip
def test_what_is_no_backup_is_refused(tmp_path, capsys, listing):
    (tmp_path / "listing.json").write_text(listing)
    assert main(["restore", str(tmp_path), "--store", str(tmp_path / "s")]) == 2
    assert "is not the listing of a backup" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_a_folder_that_is_no_backup_is_refused(tmp_path, capsys):
    (tmp_path / "other").mkdir()
    for folder, text in (("other", "is not a backup"), ("absent", "does not exist; name")):
        assert main(["restore", str(tmp_path / folder), "--store", str(tmp_path / "s")]) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path / folder}" in error
        assert text in error
    assert not (tmp_path / "s").exists()


def test_gc_removes_leftovers_and_old_bad_files(tmp_path, capsys, monkeypatch):
    store = SetStore(tmp_path)
    write(store, "good")
    (tmp_path / "sets" / "bad.safetensors").write_bytes(b"noise")
    assert list(store.bad.reasons()) == []
    assert len(store.records()) == 1
    assert list(store.bad.reasons()) == ["bad"]
    leftover, folder = tmp_path / "tmp" / "0123", tmp_path / "tmp" / "backup-01"
    folder.mkdir()
    os.utime(folder, (1, 1))
    with store.new_file() as file:
        file.write(b"in use")
        file.flush()
        leftover.write_bytes(b"x")
        command = ["gc", "--store", str(tmp_path)]
        assert main(command) == 0
        assert not leftover.exists()
        assert not folder.exists()
        assert Path(file.name).exists()
    assert len(list((tmp_path / "bad").iterdir())) == 2  # younger than a month
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 31 * 86400)
    assert main(command) == 0
    assert "no bad file removed" in capsys.readouterr().out
    assert len(list((tmp_path / "bad").iterdir())) == 2
    assert main([*command, "--days", "40", "--yes"]) == 0
    assert len(list((tmp_path / "bad").iterdir())) == 2
    assert main([*command, "--yes"]) == 0
    assert list((tmp_path / "bad").iterdir()) == []
    assert [one.name for one in store.records()] == ["good"]


def test_verify_rebuild_makes_the_index_again(tmp_path, capsys):
    store = SetStore(tmp_path)
    write(store, "a")
    assert main(["verify", "--rebuild", "--store", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "1 sets\n"
    assert [path.name for path in (tmp_path / "index-1").glob("*.sqlite")] == ["2.sqlite"]
    assert_agrees(store)

"""What others drop into a store's folder: named with what to do, and neither read nor moved."""

import contextlib
import os
import shutil
import sqlite3
import time

import pytest
from conftest import TINY
from test_index import write

from bonsai_lora.storage import dropped, listing
from bonsai_lora.storage.dropped import Dropped
from bonsai_lora.storage.store import SetStore

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def store(tmp_path):
    made = SetStore(tmp_path / "store")
    write(made, "mine")
    assert made.dropped() == Dropped()
    return made


def everything(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def in_table(store, statement):
    [path] = (store.root / "index-1").glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


def test_adapters_are_named_wherever_they_are_dropped(store):
    for folder in (store.root, store.root / "sets"):
        shutil.copytree(TINY / "plain", folder / "folder")
        shutil.copy(TINY / "plain" / CONFIG, folder / CONFIG)
        shutil.copy(TINY / "plain" / MODEL, folder / ".hidden.safetensors")
        (folder / "lora.gguf").write_bytes(b"GGUF")
    shutil.copy(TINY / "plain" / MODEL, store.root / MODEL)
    (store.root / "sets" / "notes").write_text("not an adapter")
    before = everything(store.root)
    found = store.dropped()
    assert found.names == [
        *(CONFIG, MODEL, "folder/", "lora.gguf"),
        *(f"sets/{name}" for name in (CONFIG, "folder/", "lora.gguf", "notes")),
    ]
    assert found.count == len(found.names)
    advice = found.advice()
    assert advice["sets/notes"] == "it is not of the store; move it out"
    assert advice["folder/"] == advice["sets/lora.gguf"]
    assert "bonsai-lora push" in advice["folder/"]
    assert "both adapter files" in advice[MODEL]
    assert everything(store.root) == before
    assert [one.name for one in store.records()] == ["mine"]


def test_what_is_removed_is_not_named_any_more(store):
    for folder in (store.root, store.root / "sets"):
        (folder / "a.gguf").touch()
    assert store.dropped().count == 2
    for folder in (store.root, store.root / "sets"):
        (folder / "a.gguf").unlink()
    assert store.dropped() == Dropped()


def test_only_adapters_are_named_beside_the_sets(store):
    for name in ("lost+found", "index-2", "backup", "empty"):
        (store.root / name).mkdir()
    (store.root / "README").touch()
    (store.root / "sets" / CONFIG).touch()  # which makes `sets` no adapter
    (store.root / "loop").symlink_to("loop")
    assert store.dropped().names == [f"sets/{CONFIG}"]


def test_a_link_to_nothing_is_named(store):
    path = store.root / "sets" / "gone.safetensors"
    path.symlink_to(store.root / "nowhere")
    assert store.dropped().names == ["sets/gone.safetensors"]
    assert [one.name for one in store.records()] == ["mine"]
    path.unlink()
    assert store.dropped() == Dropped()


def test_weights_under_the_name_of_a_set_are_kept_aside_with_advice(store):
    weights = (TINY / "plain" / MODEL).read_bytes()
    (store.root / "sets" / "other.safetensors").write_bytes(weights)
    assert [one.name for one in store.records()] == ["mine"]
    assert "run bonsai-lora push" in store.bad_files()["other"]
    [kept] = (store.root / "bad").glob("other.*.safetensors")
    assert kept.read_bytes() == weights
    assert store.dropped() == Dropped()


def test_names_are_printable(store):
    for folder in (store.root, store.root / "sets"):
        (folder / "a\n\x1b[2J\u202e.gguf").touch()
        (folder / os.fsdecode(b"b\xff.gguf")).touch()
        (folder / "b\\udcff.gguf").touch()  # looks the same when it is printed
    found = store.dropped()
    assert found.count == 6
    assert all(name.isprintable() and name.encode() for name in found.names)


def test_a_thousand_are_named_and_all_of_the_sets_folder_counted(store, monkeypatch):
    for number in range(dropped.MOST_NAMED + 5):
        (store.root / "sets" / f"{number}.gguf").touch()
    for number in range(8):
        (store.root / f"{number}.gguf").touch()
    found = store.dropped()
    assert (found.count, len(found.names)) == (dropped.MOST_NAMED + 13, dropped.MOST_NAMED)
    monkeypatch.setattr(dropped, "_MOST_LOOKED_AT", 5)
    assert store.dropped().count <= dropped.MOST_NAMED + 10


def test_another_process_need_not_look_again(store, monkeypatch):
    (store.root / "sets" / "a.gguf").touch()
    assert store.dropped().names == ["sets/a.gguf"]
    other = SetStore(store.root)
    monkeypatch.setattr(listing, "_FEW", 0)
    monkeypatch.setattr(listing.Listing, "_look", None)  # would raise
    assert other.dropped().names == ["sets/a.gguf"]
    write(other, "new")
    assert store.dropped().names == ["sets/a.gguf"]


def test_what_was_dropped_during_a_change_is_found_by_the_maintenance(store, monkeypatch):
    def drop():
        (store.root / "sets" / "a.gguf").touch()

    store.listing.change("mine", drop)
    assert store.dropped() == Dropped()  # the folder's time is that of the change
    store.maintain()  # compared a moment ago
    assert store.dropped() == Dropped()
    later = time.time() + listing._COMPARE_SECONDS + 1
    monkeypatch.setattr(listing.time, "time", lambda: later)
    store.maintain()
    assert store.dropped().names == ["sets/a.gguf"]


def test_a_folder_that_cannot_be_listed_names_nothing(store, monkeypatch):
    (store.root / "a.gguf").touch()
    (store.root / "sets" / "b.gguf").touch()
    real = os.scandir

    def refuse(path):
        if path == store.root:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may list any folder
    assert store.dropped().names == ["sets/b.gguf"]


def test_a_damaged_row_is_made_again(store):
    (store.root / "sets" / "a.gguf").touch()
    assert store.dropped().count == 1
    for text in ("", "[", "{"):
        in_table(store, f"UPDATE dropped SET names = '{text}'")
        assert store.dropped().names == ["sets/a.gguf"]


def test_a_table_of_an_older_release_gets_the_row(store):
    in_table(store, "DROP TABLE dropped")
    (store.root / "sets" / "a.gguf").touch()
    assert SetStore(store.root).dropped().names == ["sets/a.gguf"]

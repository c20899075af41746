"""The commands over a bucket, which is in memory here; `tests/cluster` has a real server."""

import importlib.util
from datetime import timedelta

import obstore
import pytest
from buckets import Line, create, delete
from obstore.store import MemoryStore

from bonsai_lora.cli import bucket as commands
from bonsai_lora.cli.main import main
from bonsai_lora.storage import bucket_store
from bonsai_lora.storage.bucket_store import open_bucket_store
from bonsai_lora.storage.store import SetStore

STORE = "s3://bucket/prefix"


@pytest.fixture
def line(monkeypatch):
    found = Line(MemoryStore())
    for module in (bucket_store, commands):
        monkeypatch.setattr(module, "open_bucket", lambda _: found)
    return found


@pytest.fixture
def store(line, tmp_path):
    options = {"cache_bytes": 1 << 30, "stale_seconds": 0, "stale_if_error_seconds": 0}
    return open_bucket_store(STORE, tmp_path / "cache", **options)


def test_verify_reads_every_blob_and_says_what_is_wrong(store, line, capsys):
    for name in ("a", "b", "c", "d"):
        create(store, name)
    delete(store, "d")
    assert main(["verify", "--store", STORE]) == 0
    assert capsys.readouterr().out == "a  ok\nb  ok\nc  ok\n"
    blobs = [one["path"] for chunk in obstore.list(line._small, "blobs") for one in chunk]
    for key in blobs:
        body = bytes(obstore.get(line._small, key).bytes())
        if b'"name": "a"' in body or b'\\"name\\": \\"a\\"' in body:
            obstore.put(line._small, key, body[:-1] + bytes([body[-1] ^ 1]))
        if b'"name": "b"' in body or b'\\"name\\": \\"b\\"' in body:
            obstore.delete(line._small, key)
    obstore.put(line._small, "sets/c", b"{}")
    assert main(["verify", "--store", STORE]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [one.split()[:2] for one in lines] == [["a", "bad:"], ["b", "bad:"], ["c", "bad:"]]
    assert "SHA-256" in lines[0]
    assert "missing" in lines[1]
    assert "format" in lines[2]
    assert main(["verify", "d", "nobody", "--store", STORE]) == 1
    assert capsys.readouterr().out == "d  missing\nnobody  missing\n"


def test_gc_says_what_it_did(store, line, capsys):
    create(store, "a")
    delete(store, "a")
    create(store, "a")
    line.now = lambda: Line.now(line) + timedelta(days=2)
    assert main(["gc", "--store", STORE]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "1 set, 128 bytes as float32; the index is written"
    assert printed[1].startswith("1 blob removed, ")
    assert printed[2] == "0 deleted sets removed"
    delete(store, "a")
    create(store, "b")
    obstore.put(line._small, "sets/c", b"[]")
    assert main(["gc", "--store", STORE]) == 1
    printed = capsys.readouterr().out
    assert "1 deleted set kept: the bucket has no conditional delete" in printed
    assert "c: its pointer cannot be read; no blob was removed" in printed


def test_restore_moves_a_folder_into_a_bucket(store, tmp_path, capsys):
    folder = SetStore(tmp_path / "folder")
    for name in ("a", "b"):
        create(folder, name)
    backup = str(tmp_path / "backup")
    assert main(["backup", backup, "--store", str(tmp_path / "folder")]) == 0
    create(store, "b")
    assert main(["restore", backup, "--store", STORE]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 sets are in s3://bucket/prefix" in captured.out
    assert "a different set named 'b' exists" in captured.err
    assert bytes(store.read("a").file) == bytes(folder.read("a").file)
    delete(store, "b")
    assert main(["restore", backup, "--store", STORE]) == 0
    assert bytes(store.read("b").file) == bytes(folder.read("b").file)


def code_of(words):
    try:
        return main(words)
    except SystemExit as exited:
        return exited.code


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backup", "folder", "--store", STORE], "a bucket is not backed up"),
        (["verify", "--rebuild", "--store", STORE], "bonsai-lora gc"),
        (["gc", "--store", "s3://"], "names no bucket"),
        (["restore", "folder", "--store", "gs:///x"], "names no bucket"),
        (["serve", "--store", "az://", "--port", "0"], "names no bucket"),
    ],
)
def test_what_a_bucket_cannot_do_is_refused(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert code_of(words) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_obstore_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr("bonsai_lora.settings.find_spec", lambda _: None)
    assert importlib.util.find_spec("obstore") is not None
    assert code_of(["gc", "--store", STORE]) == 2
    assert "pip install obstore" in capsys.readouterr().err


def test_a_bucket_that_does_not_answer_is_an_error_of_use(store, line, capsys):
    line.is_cut = True
    for words in (["gc"], ["verify"], ["verify", "a"]):
        assert main([*words, "--store", STORE]) == 2
        assert "line is cut" in capsys.readouterr().err

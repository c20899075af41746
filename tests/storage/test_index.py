"""The derived index of a store: whatever happens, it says what the files say."""

import contextlib
import itertools
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import QuotaExceededError, SetNotFoundError
from bonsai_lora.service.keys import Key, Quota
from bonsai_lora.service.limits import Limits
from bonsai_lora.service.stats import store_stats
from bonsai_lora.service.view import SetView
from bonsai_lora.storage import listing
from bonsai_lora.storage.index import Row, SetIndex, Sums
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import read_record
from bonsai_lora.storage.store import SetStore

NOW = "2026-01-01T00:00:00.000000Z"
EVERYTHING = "everything"
LIMITS = Limits(*[1 << 40] * 9)


def write(store, name, rank=1, base="base"):
    lora_set = BonsaiLoraSet.new(LoraConfig(rank=rank), base, name).add_adapters({"m": (4, 4)})
    with store.lock(name):
        try:
            previous = store.read_record(name)
        except SetNotFoundError:
            previous = None
        store.write(
            NextVersion(lora_set=lora_set, origin="initialized", now=NOW, previous=previous)
        )


def delete(store, name):
    with store.lock(name):
        store.delete(name)


def in_files(root):
    """The records of the files, sorted by name."""
    return [
        read_record(path) for path in sorted((root / "sets").iterdir(), key=lambda one: one.stem)
    ]


def assert_agrees(store, *, starts=("", "a", "a.", "b.x")):
    """What the index says is what the files say."""
    truth = in_files(store.root)
    assert store.records() == truth
    for start in starts:
        own = [one for one in truth if one.name.startswith(start)]
        assert store.listing.ask(lambda index, start=start: index.sums(start)) == Sums(
            len(own),
            sum(one.adapter_count for one in own),
            sum(one.total_trainable_params for one in own),
            sum(one.total_memory_bytes for one in own),
        )


def key_of(*prefixes, quota=Quota()):  # noqa: B008 - immutable
    return Key("k", b"", frozenset({"read", "write"}), prefixes, quota=quota)


def test_any_changes_of_two_processes_are_in_both_indexes(tmp_path):
    random_ = random.Random(1)
    stores = [SetStore(tmp_path), SetStore(tmp_path)]
    names = ["a", "a.b", "a.c", "ab", "b.x", "b.x1", "B"]
    for _ in range(80):
        store, name = random_.choice(stores), random_.choice(names)
        if random_.random() < 0.3 and (tmp_path / "sets" / f"{name}.safetensors").exists():
            delete(store, name)
        else:
            write(store, name, rank=random_.randint(1, 4), base=random_.choice("xy"))
        if random_.random() < 0.2:
            for one in stores:
                assert_agrees(one)
    for one in (*stores, SetStore(tmp_path)):
        assert_agrees(one)
    assert len(list((tmp_path / "index-1").glob("*.sqlite"))) == 1


def test_own_changes_are_noted_without_a_comparison(tmp_path, monkeypatch):
    stores = [SetStore(tmp_path), SetStore(tmp_path)]
    for store in stores:
        assert store.records() == []
    monkeypatch.setattr(listing.Listing, "_settle", None)  # would raise
    for number, store in enumerate(stores * 3):
        write(store, f"s{number}")
        write(store, f"s{number}", rank=2)
    delete(stores[0], "s5")
    for store in stores:
        assert [one.name for one in store.records()] == ["s0", "s1", "s2", "s3", "s4"]
        assert SetView(store, LIMITS).held_bytes(besides="s0") == 4 * 4 * 16


def test_pages_follow_names_prefixes_and_bases(tmp_path):
    store = SetStore(tmp_path)
    names = ["B", "a", "a-1", "a.b", "a.c", "a_", "ab", "b.x", "b.y"]
    for number, name in enumerate(names):
        write(store, name, base="even" if number % 2 == 0 else "odd")
    prefixes = ["", "a", "a.", "zz"]
    keys = [key_of(""), key_of("a."), key_of("b.", "a.", "a.b"), key_of()]
    for key, prefix, base, limit in itertools.product(keys, prefixes, [None, "even"], [1, 2, 100]):
        view, found, after = SetView(store, LIMITS, key), [], ""
        while page := view.page(prefix, after=after, base_model_name=base, limit=limit).records:
            assert len(page) <= limit
            found += [one.name for one in page]
            after = found[-1]
        assert found == [
            name
            for number, name in enumerate(names)
            if key.owns(name) and name.startswith(prefix) and (base is None or number % 2 == 0)
        ]


@pytest.mark.parametrize("count", [3, 40])
def test_the_largest_sets_are_those_of_the_key(tmp_path, count):
    store = SetStore(tmp_path)
    for number in range(count):
        write(store, f"a.{number}", rank=1 + number % 4)
        write(store, f"b.{number}", rank=1 + number % 3)
    for key in (key_of(""), key_of("a."), key_of("a.1", "b.")):
        own = [one for one in in_files(tmp_path) if key.owns(one.name)]
        own.sort(key=lambda one: (-one.total_memory_bytes, one.name))
        assert SetView(store, LIMITS, key).largest(7).records == own[:7]
        assert store_stats(SetView(store, LIMITS, key)).sums.sets == len(own)


def test_a_table_that_is_filled_at_once_counts_its_sums(tmp_path):
    store = SetStore(tmp_path)
    for name in ("a", "b", "b.x"):
        write(store, name)
    index = SetIndex(None)
    with index.transaction():
        index.fill(Row(one.name, "", one, 1) for one in in_files(tmp_path))
    for start in ("", "b"):
        assert index.sums(start) == store.listing.ask(lambda kept, start=start: kept.sums(start))


def test_a_quota_counts_each_set_once(tmp_path):
    store = SetStore(tmp_path)
    for name in ("a.1", "a.b.1", "b.1"):
        write(store, name)
    view = SetView(store, LIMITS, key_of("a.", "a.b.", quota=Quota(sets=2, bytes=3 * 32)), "write")
    view.check_budget("a.1", 64)
    for name, size in (("a.1", 65), ("a.2", 1)):
        with pytest.raises(QuotaExceededError):
            view.check_budget(name, size)
    delete(store, "a.b.1")
    view.check_budget("a.2", 64)


def test_what_others_put_change_and_remove_is_found(tmp_path):
    store = SetStore(tmp_path / "one")
    other = SetStore(tmp_path / "other")
    write(store, "here")
    for number in range(20):  # each within the same tick of the kernel's clock
        write(other, f"new-{number}")
        shutil.copy(other.root / "sets" / f"new-{number}.safetensors", store.root / "sets")
        assert_agrees(store)
        write(store, "here", rank=1 + number % 3)
    (store.root / "sets" / "new-3.safetensors").unlink()
    assert_agrees(store)
    path = store.root / "sets" / "new-4.safetensors"
    write(other, "new-4", rank=3)
    path.write_bytes((other.root / "sets" / "new-4.safetensors").read_bytes())  # the same inode
    store.listing.compare()
    assert_agrees(store)


def test_own_changes_are_noted_while_a_comparison_has_to_wait(tmp_path, monkeypatch):
    """In a large folder that others keep changing, what was acknowledged is listed at once."""
    monkeypatch.setattr(listing, "_FEW", 0)
    store = SetStore(tmp_path)
    write(store, "a")
    (tmp_path / "sets" / "b.safetensors").write_bytes(b"by others")
    write(store, "c")
    assert [one.name for one in store.records()] == ["a", "c"]
    delete(store, "a")
    assert [one.name for one in store.records()] == ["c"]
    assert SetView(store, LIMITS).held_bytes("") == 32


def test_a_comparison_is_shared_by_the_workers(tmp_path, monkeypatch):
    stores = [SetStore(tmp_path), SetStore(tmp_path)]
    for store in stores:
        store.records()
    path = tmp_path / "sets" / "s.safetensors"
    write(stores[0], "s")
    path.write_bytes(path.read_bytes() + b"x")  # in place: only the file's own time tells
    stores[1].listing.compare(only_if_due=True)
    assert len(stores[0].records()) == 1
    later = time.time() + 31
    monkeypatch.setattr(time, "time", lambda: later)
    stores[1].listing.compare(only_if_due=True)
    assert stores[0].records() == []
    assert list(stores[1].bad.reasons()) == ["s"]


def states_of_index(root, tmp_path):
    """Copy the index as a loss of power may leave it, with and without its write-ahead log."""
    source = root / "index-1"
    for number, endings in enumerate([("", "-wal"), ("",)]):
        copy = tmp_path / f"{root.name}-index-{number}-{time.time_ns()}"
        copy.mkdir()
        for path in source.iterdir():
            if path.name.removeprefix("1.sqlite") in endings:
                shutil.copy(path, copy)
        yield copy


def damaged(index, tmp_path):
    """Copies of the index as a disk that lies may leave it."""
    content = (index / "1.sqlite").read_bytes()
    for number, bad in enumerate([b"", b"noise" * 1000, content[: len(content) // 2]]):
        copy = tmp_path / f"damaged-{number}"
        copy.mkdir()
        (copy / "1.sqlite").write_bytes(bad)
        yield copy
    yield tmp_path / "nothing"


@pytest.mark.parametrize("change", ["create", "replace", "delete"])
def test_any_index_beside_any_files_is_put_right_at_the_start(tmp_path, change):
    """Files and index reach the disk in any order: each old state meets each new one."""
    root = tmp_path / "store"
    store = SetStore(root)
    write(store, "other")
    if change != "create":
        write(store, "s")
    files, indexes = [], []
    for step in range(2):
        if step == 1:
            delete(store, "s") if change == "delete" else write(store, "s", rank=3)
        assert_agrees(store)
        files.append(shutil.copytree(root / "sets", tmp_path / f"sets-{step}"))
        indexes += states_of_index(root, tmp_path)
    indexes += damaged(indexes[-1], tmp_path)
    assert len(indexes) == 8
    for number, (sets, index) in enumerate(itertools.product(files, indexes)):
        found = tmp_path / "found" / str(number)
        shutil.copytree(sets, found / "sets")
        if index.exists():
            shutil.copytree(index, found / "index-1")
        opened = SetStore(found)
        assert_agrees(opened)
        write(opened, "after")
        assert_agrees(opened)
        assert_agrees(SetStore(found))


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_index import SetIndex, SetStore, delete, write
store = SetStore(Path({root!r}))
store.records()
SetIndex.{method} = lambda *_: os._exit(9)
{change}
"""


@pytest.mark.parametrize(
    ("method", "change", "names"),
    [
        ("put", "write(store, 'new')", ["new", "old"]),
        ("remove", "delete(store, 'old')", []),
        ("set_folder_time", "write(store, 'new')", ["new", "old"]),
    ],
)
def test_a_process_that_dies_between_file_and_index(tmp_path, method, change, names):
    store = SetStore(tmp_path)
    write(store, "old")
    assert_agrees(store)
    values = {"tests": os.path.dirname(__file__), "root": str(tmp_path)}
    script = KILLED.format(method=method, change=change, **values)
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert died.returncode == 9, died.stderr
    assert [one.name for one in store.records()] == names
    assert_agrees(store)


@pytest.mark.parametrize("harm", ["noise", "removed", "row", EVERYTHING])
def test_a_damaged_index_is_made_again_while_all_go_on(tmp_path, harm):
    stores = [SetStore(tmp_path), SetStore(tmp_path)]
    for number in range(5):
        write(stores[number % 2], f"s{number}")
        assert_agrees(stores[1])
    path = tmp_path / "index-1" / "1.sqlite"
    if harm == "noise":
        for one in (path, path.with_name("1.sqlite-wal")):
            one.write_bytes(os.urandom(one.stat().st_size))
    elif harm == "removed":
        path.unlink()
    elif harm == "row":
        stores[0].listing.ask(lambda index: index._ask("UPDATE sets SET record = '{\"name\": 3}'"))
    else:
        shutil.rmtree(tmp_path / "index-1")
    for number in range(4):
        write(stores[number % 2], f"t{number}")
        for store in stores:
            assert_agrees(store)
    assert_agrees(SetStore(tmp_path))


@pytest.mark.parametrize("why", ["no folder", "read-only"])
def test_a_store_without_an_index_file_still_serves(tmp_path, monkeypatch, why):
    root, said = tmp_path / "store", []
    monkeypatch.setattr(listing._log, "warning", lambda *words: said.append(words))
    if why == "no folder":
        root.mkdir()
        (root / "index-1").write_text("in the way")
    else:
        monkeypatch.setattr(listing.os, "access", lambda *_: False)
    stores = [SetStore(root), SetStore(root)]
    for number in range(4):
        write(stores[number % 2], f"s{number}")
        for store in stores:
            assert_agrees(store)
    delete(stores[0], "s1")
    for store in stores:
        assert_agrees(store)
    assert not list(root.glob("index-1/*.sqlite"))
    assert len(said) == (2 if why == "no folder" else 0)  # once per process


def test_a_locked_index_does_not_stop_a_write(tmp_path, monkeypatch):
    monkeypatch.setattr("bonsai_lora.storage.index._BUSY_SECONDS", 0.05)
    store, other = SetStore(tmp_path), SetStore(tmp_path)
    write(store, "s")
    assert_agrees(other)
    holder = SetIndex(tmp_path / "index-1" / "1.sqlite")
    with holder.transaction():
        write(store, "t")
        assert store.read("t").record.version == 1
        assert_agrees(store)
    assert_agrees(other)
    holder.close()


def test_threads_and_stores_change_and_list_at_once(tmp_path):
    stores = [SetStore(tmp_path) for _ in range(3)]
    failures = []

    def work(number):
        try:
            for round_ in range(8):
                write(stores[number % 3], f"a.{number}")
                stores[(number + round_) % 3].records()
                if round_ % 3 == 2:
                    delete(stores[number % 3], f"a.{number}")
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for store in stores:
        assert_agrees(store)


def test_a_rebuild_takes_all_processes_along(tmp_path):
    store = SetStore(tmp_path)
    write(store, "s")
    # A wrong sum, which no comparison of rows with files can find.
    store.listing.ask(lambda index: index._ask("UPDATE sums SET held = 7"))
    assert SetView(store, LIMITS).held_bytes("") == 7
    SetStore(tmp_path).listing.rebuild()
    assert_agrees(store)
    assert [path.name for path in (tmp_path / "index-1").glob("*.sqlite")] == ["2.sqlite"]


def test_others_list_and_change_sets_while_the_table_is_rebuilt(tmp_path, monkeypatch):
    store = SetStore(tmp_path)
    for name in ("a", "b"):
        write(store, name)
    monkeypatch.setattr(listing, "_FEW", 1)
    seen = []
    real = listing.Listing._look

    def look(one):
        found = real(one)
        if not seen:  # the files have been looked at, and nothing is in the new table yet
            seen.append([row.name for row in store.records()])
            write(store, "c")
            store.delete("a")
            seen.append([row.name for row in store.records()])
        return found

    monkeypatch.setattr(listing.Listing, "_look", look)
    (tmp_path / "index-1" / "new.sqlite").write_bytes(b"of a process that was killed")
    SetStore(tmp_path).listing.rebuild()
    assert seen == [["a", "b"], ["b", "c"]]
    assert_agrees(store)
    assert_agrees(SetStore(tmp_path))
    assert [path.name for path in (tmp_path / "index-1").glob("*.sqlite")] == ["2.sqlite"]


def test_a_large_folder_that_has_not_changed_is_not_looked_at_when_a_process_begins(
    tmp_path, monkeypatch
):
    write(SetStore(tmp_path), "a")
    write(SetStore(tmp_path), "b")
    looked = []
    real = listing.Listing._look
    monkeypatch.setattr(listing.Listing, "_look", lambda one: looked.append(1) or real(one))
    monkeypatch.setattr(listing, "_FEW", 1)
    assert SetStore(tmp_path).sums("").sets == 2
    assert looked == []
    (tmp_path / "sets" / "a.safetensors").unlink()
    assert SetStore(tmp_path).sums("").sets == 1
    assert looked == [1]
    (tmp_path / "sets" / "b.safetensors").write_bytes(b"changed in place")
    store = SetStore(tmp_path)
    store.listing.compare()
    assert store.sums("").sets == 0


def looks(monkeypatch):
    """Return a list that grows with each look at all files; every folder counts as large."""
    looked, real = [], listing.Listing._look
    monkeypatch.setattr(listing.Listing, "_look", lambda one: looked.append(1) or real(one))
    monkeypatch.setattr(listing, "_FEW", 0)
    return looked


def test_no_request_waits_for_a_look_at_a_large_folder_that_others_change(tmp_path, monkeypatch):
    store, other = SetStore(tmp_path / "one"), SetStore(tmp_path / "other")
    write(store, "a")
    write(other, "b")
    looked = looks(monkeypatch)
    for _ in range(3):
        shutil.copy(other.root / "sets" / "b.safetensors", store.root / "sets")
        assert store.sums("").sets == 1
        write(store, "a")
    assert looked == []
    assert store.read("b").record.version == 1
    later = time.time() + 31
    monkeypatch.setattr(time, "time", lambda: later)
    store.maintain()
    assert looked == [1]
    assert_agrees(store)


def test_processes_that_begin_without_a_table_make_one(tmp_path, monkeypatch):
    for number in range(6):
        write(SetStore(tmp_path), f"s{number}")
    shutil.rmtree(tmp_path / "index-1")
    looked, look = looks(monkeypatch), listing.Listing._look
    monkeypatch.setattr(listing.Listing, "_look", lambda one: time.sleep(0.5) or look(one))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: SetStore(tmp_path).sums("").sets, range(4)))
    assert (found, looked) == ([6] * 4, [1])


def test_writers_need_not_wait_while_files_are_read(tmp_path, monkeypatch):
    for number in range(3):
        write(SetStore(tmp_path), f"s{number}")
    shutil.rmtree(tmp_path / "index-1")
    free, real = [], listing.Listing._read_row

    def read_row(one, name):
        path = tmp_path / "index-1" / "1.sqlite"
        with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            free.append(name)
        return real(one, name)

    monkeypatch.setattr(listing.Listing, "_read_row", read_row)
    assert_agrees(SetStore(tmp_path))
    assert free == ["s0", "s1", "s2"]


def test_a_file_that_changes_after_it_was_read_is_read_again(tmp_path, monkeypatch):
    store = SetStore(tmp_path / "one")
    for name in ("a", "b", "c"):
        write(store, name)
    real, changed = listing.Listing._read_row, []

    def read_row(one, name):
        row = real(one, name)
        if name not in changed:
            changed.append(name)
            path = store.root / "sets" / f"{name}.safetensors"
            if name == "b":
                path.unlink()
            else:
                shutil.copy(other.root / "sets" / path.name, path)
        return row

    other = SetStore(tmp_path / "other")
    for name in ("a", "c"):
        write(other, name, rank=3)
    shutil.rmtree(store.root / "index-1")
    monkeypatch.setattr(listing.Listing, "_read_row", read_row)
    monkeypatch.setattr(listing, "_FEW", 0)  # nothing but this comparison puts it right
    opened = SetStore(store.root)
    assert opened.sums("").sets == 2
    assert changed == ["a", "b", "c"]
    assert_agrees(opened)


STOPPED = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_index import SetStore, listing
listing._FEW, listing._BATCH = 0, 2
store, real, calls = SetStore(Path({root!r})), listing.Listing._read_row, []
{before}
def read_row(*arguments):
    calls.append(1)
    if len(calls) > {most}:
        os._exit(9)
    return real(*arguments)
listing.Listing._read_row = read_row
listing.Listing._look, look = lambda one: {look}, listing.Listing._look
store.sums("")
store.listing.compare()
os._exit(1)
"""


def stop(root, *, most=3, before="", look="look(one)"):
    values = {"tests": os.path.dirname(__file__), "root": str(root)}
    script = STOPPED.format(**values, most=most, before=before, look=look)
    died = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert died.returncode == 9, died.stderr


def test_a_process_that_dies_while_it_makes_the_table(tmp_path, monkeypatch):
    for number in range(6):
        write(SetStore(tmp_path), f"s{number}")
    shutil.rmtree(tmp_path / "index-1")
    stop(tmp_path)
    looked = looks(monkeypatch)
    assert SetStore(tmp_path).sums("").sets == 6
    assert SetStore(tmp_path).sums("").sets == 6
    assert looked == [1], "what was made is trusted"


def test_a_process_that_dies_while_it_looks_for_changes_of_others(tmp_path, monkeypatch):
    one, other = SetStore(tmp_path / "one"), SetStore(tmp_path / "other")
    for number in range(6):
        write(one if number < 3 else other, f"s{number}")
    one.sums("")
    for path in (other.root / "sets").iterdir():
        shutil.copy(path, one.root / "sets")
    stop(one.root, most=1)
    looked = looks(monkeypatch)
    opened = SetStore(one.root)
    assert (opened.sums("").sets, looked) == (6, [1])


def test_a_process_that_dies_while_it_looks_at_what_agrees(tmp_path, monkeypatch):
    """The next one does not look at all files for that."""
    write(SetStore(tmp_path), "s")
    stop(tmp_path, before="store.sums('')", look="os._exit(9)")
    looked = looks(monkeypatch)
    assert SetStore(tmp_path).sums("").sets == 1
    assert looked == []

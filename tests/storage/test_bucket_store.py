"""The guarantees of a store in a bucket, between machines that share nothing else.

The bucket is obstore's, in memory; `tests/cluster` has a server of S3.
"""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import obstore
import pytest
from buckets import NOW, URL, Machines, add, create, delete, made, modules_of

from bonsai_lora.errors import (
    ChangedMeanwhileError,
    MemoryBudgetError,
    NewerFormatError,
    SetNotFoundError,
    StoreFullError,
    StoreUnreachableError,
)
from bonsai_lora.storage import bucket_store, cache, freshness
from bonsai_lora.storage.cache import Cache
from bonsai_lora.storage.cache_folder import release_all
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.pointer import decode_pointer


@pytest.fixture
def machines(tmp_path):
    return Machines(tmp_path)


def requests_of(store, work):
    """Return the requests that `work` costs, by kind."""
    before = dict(store.line.requests)
    work()
    return {
        kind: number - before.get(kind, 0)
        for kind, number in store.line.requests.items()
        if number != before.get(kind, 0)
    }


def test_a_set_is_the_same_file_on_every_machine(machines):
    one, other = machines.store("one"), machines.store("other")
    record = create(one)
    assert other.read("s").record == record
    assert bytes(other.read("s").file) == bytes(one.read("s").file)
    pointer = decode_pointer("s", bytes(obstore.get(machines.memory, "sets/s").bytes()))
    assert bytes(obstore.get(machines.memory, pointer.blob).bytes()) == bytes(one.read("s").file)


def test_a_record_is_read_without_the_set(machines):
    one, other = machines.store("one"), machines.store("other")
    record = create(one)
    for _ in range(2):
        assert requests_of(other, lambda: other.read_record("s") == record) == {"get": 1}
    assert other.read_record("s") == record
    assert other.state().cache_bytes == 0
    other.read("s")
    assert requests_of(other, lambda: other.read_record("s")) == {}
    delete(one)
    for name in ("s", "nobody", "../s", ""):
        with pytest.raises(SetNotFoundError):
            machines.store("third").read_record(name)


def test_a_change_is_seen_at_once_on_its_machine_and_after_a_refresh_elsewhere(machines):
    one, other = machines.store("one"), machines.store("other")
    same_machine = machines.store("one")
    create(one)
    for store in (other, same_machine):
        assert store.read("s").record.version == 1
    before = other.read("s")
    assert add(one, "more").version == 2
    assert one.read_quickly("s").record.version == 2
    assert same_machine.read_quickly("s").record.version == 2
    assert other.read_quickly("s").record.version == 1, "within the stale time"
    other.refresh("s")
    assert other.read_quickly("s").record.version == 2
    assert before.record.version == 1
    assert np.asarray(before.file).size, "what runs keeps its version"


def test_a_change_is_seen_within_the_stale_time(machines):
    one, other = machines.store("one", stale=0.3), machines.store("other", stale=0.3)
    create(one)
    other.read("s")
    add(one, "more")
    changed = time.monotonic()
    while other.read("s").record.version == 1:
        assert time.monotonic() - changed < 0.3 + 1.0
        time.sleep(0.01)
    assert other.read("s").record.version == 2


def test_a_look_is_taken_beside_requests_before_the_stale_time_is_over(machines):
    store = machines.store(stale=0.5)
    create(store)
    looked = store._looks.get("s").at
    for _ in range(40):
        assert store.read_quickly("s") is not None, "no request waits for the bucket"
        time.sleep(0.025)
    assert store._looks.get("s").at > looked + 0.5
    assert 1 <= store.state().counts["looks_same"] <= 4


def test_a_set_in_use_costs_no_requests_within_the_stale_time(machines):
    store = machines.store()
    create(store)
    assert requests_of(store, lambda: [store.read("s") for _ in range(100)]) == {}
    assert store.read_quickly("s") is store.read("s")


def test_first_reads_at_once_make_one_fetch(machines):
    create(machines.store("one"))
    other = machines.store("other")
    start = threading.Barrier(50)

    def read(_):
        start.wait()
        return other.read("s").record.version

    with ThreadPoolExecutor(50) as threads:
        assert set(threads.map(read, range(50))) == {1}
    assert other.line.requests == {"get": 2}, "the pointer and the blob"
    with ThreadPoolExecutor(50) as threads:
        found = list(threads.map(lambda _: _missing(other, start), range(50)))
    assert found == [True] * 50
    assert other.line.requests == {"get": 3}


def _missing(store, start):
    start.wait()
    with pytest.raises(SetNotFoundError):
        store.read("nobody")
    return True


def test_workers_of_a_machine_share_looks(machines):
    store = machines.store()
    create(store)
    worker = machines.store()
    assert requests_of(worker, lambda: worker.read("s")) == {}
    assert worker.read_quickly("s") is not None


def test_no_change_is_lost_between_racing_machines(machines):
    stores = [machines.store("one"), machines.store("one"), machines.store("other")]
    create(stores[0])

    def work(number):
        for turn in range(5):
            while True:
                try:
                    add(stores[number], f"m{number}_{turn}")
                    break
                except ChangedMeanwhileError:  # five tries were not enough
                    continue

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    reader = machines.store("reader")
    assert modules_of(reader) == {"q_proj"} | {f"m{n}_{t}" for n in range(3) for t in range(5)}
    assert reader.read("s").record.version == 16
    assert reader.sums("").adapters == 16, "the sums are exact, too"
    assert reader.sums("").sets == 1


def test_of_two_who_create_one_wins(machines):
    stores = [machines.store("one"), machines.store("other")]
    start = threading.Barrier(2)

    def work(store):
        with store.lock("s"):
            start.wait()
            try:
                store.write(
                    NextVersion(lora_set=made(), origin="initialized", now=NOW, previous=None)
                )
            except ChangedMeanwhileError:
                return False
        return True

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(work, stores)) == [False, True]
    stores[0].refresh("s")
    stores[1].refresh("s")
    assert stores[0].read("s").record == stores[1].read("s").record
    assert machines.store("third").sums("").sets == 1


def test_a_write_over_a_version_that_is_replaced_changes_nothing(machines):
    store, other = machines.store("one"), machines.store("other")
    create(store)
    with store.lock("s"):
        present = store.read("s")
        add(other, "theirs")
        with pytest.raises(ChangedMeanwhileError):
            store.write(
                NextVersion(lora_set=made(), origin="mixed", now=NOW, previous=present.record)
            )
    store.refresh("s")
    assert modules_of(store) == {"q_proj", "theirs"}
    assert store.sums("").adapters == 2


def test_a_deleted_set_is_gone_and_versions_go_on_when_its_name_comes_back(machines):
    one, other, worker = machines.store("one"), machines.store("other"), machines.store("one")
    create(one)
    first = other.read("s").record
    assert worker.read("s").record == first
    delete(one)
    for store in (one, worker):
        with pytest.raises(SetNotFoundError):
            store.read("s")
    assert other.read_quickly("s").record.version == 1, "within the stale time"
    other.refresh("s")
    with pytest.raises(SetNotFoundError):
        other.read_quickly("s")
    with pytest.raises(SetNotFoundError):
        delete(other)
    assert one.sums("").sets == 0
    again = create(one)
    assert (again.version, again.uid != first.uid) == (2, True)
    assert worker.read("s").record == again, "a worker that knew of the deletion"
    other.refresh("s")
    assert other.read("s").record == again


def test_copies_go_on_while_the_bucket_is_away_and_writes_are_refused(machines, monkeypatch):
    monkeypatch.setattr(freshness, "_RETRY_SECONDS", 0.05)
    store = machines.store(stale=0.1)
    create(store)
    create(store, "t")
    assert store.state().is_reachable
    store.line.is_cut = True
    time.sleep(0.15)
    assert store.read("s").record.version == 1
    assert store.read_quickly("s") is not None, "the next requests do not wait"
    assert not store.state().is_reachable
    assert store.state().counts["looks_stale"] >= 2
    for write in (create, lambda one: add(one, "more"), delete):
        with pytest.raises(StoreUnreachableError):
            write(store)
    cold = machines.store("cold")
    cold.line.is_cut = True
    with pytest.raises(StoreUnreachableError):
        cold.read("s")
    restarted = machines.store(stale=0.1)
    restarted.line.is_cut = True
    assert restarted.read("t").record.version == 1, "the notes outlive the process"
    assert restarted.sums("").sets == 0, "unknown, but no error"
    store.line.is_cut = restarted.line.is_cut = False
    time.sleep(0.1)
    assert add(restarted, "more", "t").version == 2
    waited = time.monotonic()
    while not store.state().is_reachable:  # it is found out beside the requests
        assert store.read("s").record.version == 1
        assert time.monotonic() - waited < 2
        time.sleep(0.01)
    assert add(store, "more").version == 2


def test_no_request_waits_for_a_bucket_that_is_known_to_be_away(machines, monkeypatch):
    """Even if each attempt takes its time, as where packets are dropped."""
    monkeypatch.setattr(freshness, "_RETRY_SECONDS", 0.05)
    store = machines.store(stale=0.05)
    for name in ("a", "b"):
        create(store, name)
    store.line.is_cut, store.line.delay = True, 1.0
    time.sleep(0.1)
    store.read("a")  # this one finds out
    slowest = 0.0
    for _ in range(100):
        started = time.monotonic()
        for name in ("a", "b"):
            assert store.read(name).record.version == 1
        slowest = max(slowest, time.monotonic() - started)
        time.sleep(0.005)
    assert slowest < 0.9
    assert 1 <= store.state().counts["looks_failed"] < 100


@pytest.mark.parametrize("if_error", [0.0, 0.3])
def test_copies_are_served_until_their_time_is_over_and_no_longer(machines, monkeypatch, if_error):
    monkeypatch.setattr(freshness, "_RETRY_SECONDS", 0.05)
    store = machines.store(stale=0.1, if_error=if_error)
    create(store)
    store.line.is_cut = True
    if if_error:
        time.sleep(0.15)
        assert store.read("s").record.version == 1
    time.sleep(0.4)
    assert store.read_quickly("s") is None
    with pytest.raises(StoreUnreachableError):
        store.read("s")


def put_pointer(machines, change, name="s"):
    fields = json.loads(bytes(obstore.get(machines.memory, f"sets/{name}").bytes()))
    changed = change(fields)
    body = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    obstore.put(machines.memory, f"sets/{name}", body)


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda _: b"[]",
        lambda _: b"[" * 100_000,
        lambda _: b" " * (5 << 20),
        lambda one: {**one, "blob": "../../../etc/passwd"},
        lambda one: {**one, "blob": one["blob"].replace(".safetensors", ".bin")},
        lambda one: {**one, "size": one["size"] + 1},
        lambda one: {**one, "size": -1},
        lambda one: {**one, "size": 1 << 60},
        lambda one: {**one, "sha256": "0" * 64},
        lambda one: {**one, "sha256": "../" * 21 + "x"},
        lambda one: {**one, "format": "1"},
        lambda one: {**one, "record": None},
        lambda one: {**one, "record": {**one["record"], "name": "other"}},
        lambda one: {**one, "record": {**one["record"], "uid": "../../x"}},
        lambda one: {**one, "record": {**one["record"], "version": 7}},
        lambda one: {**one, "record": {**one["record"], "updated_at": "later"}},
        lambda _: {"format": 1, "deleted": True, "uid": "/", "version": 1},
    ],
)
def test_a_pointer_is_input(machines, change):
    """Whatever stands in it, no file is made outside of the copies, and the reason is reported."""
    create(machines.store("one"))
    other = machines.store("other")
    put_pointer(machines, change)
    before = sorted(os.listdir(machines.folder))
    with pytest.raises(SetNotFoundError):
        other.read("s")
    assert other.bad_files().keys() == {"s"}
    assert sorted(os.listdir(machines.folder)) == before
    assert os.listdir(machines.folder / "other" / "sets") == []
    assert os.listdir(machines.folder / "other" / "tmp") == []


def test_a_blob_is_checked_before_it_is_served(machines):
    record = create(machines.store("one"))
    other = machines.store("other")
    pointer = decode_pointer("s", bytes(obstore.get(machines.memory, "sets/s").bytes()))
    body = bytes(obstore.get(machines.memory, pointer.blob).bytes())
    for wrong in (body[:-1], body[:-1] + bytes([body[-1] ^ 1]), body[::-1], b""):
        obstore.put(machines.memory, pointer.blob, wrong)
        with pytest.raises(SetNotFoundError):
            other.read("s")
        assert "blob" in other.bad_files()["s"]
        assert os.listdir(machines.folder / "other" / "sets") == []
        other.release("s")
    obstore.put(machines.memory, pointer.blob, body)
    other.release("s")
    assert other.read("s").record == record
    assert other.bad_files() == {}


def test_a_blob_that_has_not_arrived_is_waited_for(machines, monkeypatch):
    """As where a bucket is replicated: the older copy goes on, and without a copy there is no set yet."""
    monkeypatch.setattr(freshness, "_RETRY_SECONDS", 0.05)
    one, other, cold = machines.store("one"), machines.store("other", stale=0), machines.store("c")
    create(one)
    assert other.read("s").record.version == 1
    add(one, "more")
    pointer = decode_pointer("s", bytes(obstore.get(machines.memory, "sets/s").bytes()))
    body = bytes(obstore.get(machines.memory, pointer.blob).bytes())
    obstore.delete(machines.memory, pointer.blob)
    assert other.read("s").record.version == 1
    with pytest.raises(StoreUnreachableError, match="not its content"):
        cold.read("s")
    assert "missing" in other.bad_files()["s"]
    obstore.put(machines.memory, pointer.blob, body)
    time.sleep(0.1)
    assert other.read("s").record.version == 2
    assert cold.read("s").record.version == 2
    assert other.bad_files() == {}


def test_a_pointer_of_a_newer_release_is_left_alone(machines):
    store, other = machines.store("one"), machines.store("other")
    create(store)
    put_pointer(machines, lambda one: {**one, "format": 2})
    before = bytes(obstore.get(machines.memory, "sets/s").bytes())
    for work in (other.read, lambda name: delete(other, name), lambda name: create(other, name)):
        with pytest.raises(NewerFormatError):
            work("s")
    assert bytes(obstore.get(machines.memory, "sets/s").bytes()) == before


def test_a_damaged_copy_is_moved_aside_and_fetched_again(machines):
    create(machines.store("one"))
    other = machines.store("other")
    path = machines.folder / "other" / "sets" / "s.safetensors"
    body = bytes(other.read("s").file)
    path.with_suffix(".x").write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    path.with_suffix(".x").rename(path)
    with pytest.raises(SetNotFoundError):
        other.verify("s")
    assert bytes(other.read("s").file) == body


def test_the_least_recently_used_copy_makes_room_and_what_runs_keeps_its_map(machines):
    one = machines.store("one")
    for name in ("a", "b", "c"):
        create(one, name, width=256)
    size = len(one.read("a").file)
    other = machines.store("other", cache_bytes=2 * size + 100)
    running = other.read("a")
    content = bytes(running.file)
    other.read("b")
    os.utime(machines.folder / "other" / "notes" / "b", (1, 1))  # long not used
    other.read("c")
    copies = machines.folder / "other" / "sets"
    assert sorted(os.listdir(copies)) == ["a.safetensors", "c.safetensors"]
    os.utime(machines.folder / "other" / "notes" / "a", (1, 1))
    assert other.read("b").record.name == "b"
    assert sorted(os.listdir(copies)) == ["b.safetensors", "c.safetensors"]
    assert bytes(running.file) == content
    assert other.state().counts["evictions"] == 2
    assert other.read("a").record.version == 1, "it is fetched again"
    assert other.state().cache_bytes <= 2 * size + 100
    tight = machines.store("tight", cache_bytes=size - 1)
    with pytest.raises(StoreFullError):
        tight.read("a")
    assert os.listdir(machines.folder / "tight" / "tmp") == []


def test_copies_that_are_kept_never_make_room(machines):
    one = machines.store("one")
    for name in ("a", "b", "c"):
        create(one, name, width=256)
    size = len(one.read("a").file)
    worker = machines.store("other", cache_bytes=2 * size + 100)
    for name in ("a", "b"):
        worker.read(name)
        worker.keep(name)
    other = machines.store("other", cache_bytes=2 * size + 100)  # of the same machine
    with pytest.raises(StoreFullError, match="unload some"):
        other.read("c")
    assert other.state().cache_bytes == 2 * size
    worker.release("b")
    assert other.read("c").record.name == "c"
    copies = machines.folder / "other" / "sets"
    assert sorted(os.listdir(copies)) == ["a.safetensors", "c.safetensors"]
    release_all(machines.folder / "other")  # the service starts again
    os.utime(machines.folder / "other" / "notes" / "a", (1, 1))
    other.read("b")
    assert sorted(os.listdir(copies)) == ["b.safetensors", "c.safetensors"]


def test_a_worker_finds_what_a_different_one_has_evicted(machines):
    store = machines.store()
    create(store)
    (machines.folder / "one" / "sets" / "s.safetensors").unlink()
    assert store.read_quickly("s") is None
    assert store.read("s").record.version == 1


def test_maintenance_removes_copies_beyond_the_limit_that_other_workers_made(machines, monkeypatch):
    one = machines.store("one")
    for name in "abcd":
        create(one, name, width=256)
    size = len(one.read("a").file)
    workers = [machines.store("other", cache_bytes=2 * size + 100) for _ in range(2)]
    for worker, names in zip(workers, ("ab", "cd"), strict=True):
        for name in names:
            worker.read(name)
    copies = machines.folder / "other" / "sets"
    for worker in workers:
        worker.maintain()  # counted half a minute ago at most
    assert len(os.listdir(copies)) == 4
    monkeypatch.setattr(cache, "_RECOUNT_SECONDS", 0.0)
    os.utime(machines.folder / "other" / "notes" / "a", (1, 1))
    os.utime(machines.folder / "other" / "notes" / "c", (2, 2))
    workers[0].maintain()
    assert sorted(os.listdir(copies)) == ["b.safetensors", "d.safetensors"]
    assert workers[0].state().cache_bytes == 2 * size
    assert [one.record.name for one in workers[0].open_sets()] == ["b"]


def test_maintenance_asks_a_bucket_that_nobody_has_asked(machines, monkeypatch):
    store = machines.store()
    create(store)
    assert requests_of(store, store.maintain) == {}
    store.line.is_cut = True
    monkeypatch.setattr(bucket_store, "_PROBE_SECONDS", -1.0)
    store.maintain()
    assert not store.state().is_reachable
    store.line.is_cut = False
    assert requests_of(store, store.maintain) == {"get": 1}
    assert store.state().is_reachable


def test_what_is_counted(machines):
    one, other = machines.store("one"), machines.store("other")
    for name in ("a", "b"):
        create(one, name)
    sizes = [len(one.read(name).file) for name in ("a", "b")]
    for name in ("a", "b"):
        other.read(name)
        for _ in range(3):
            other.read_quickly(name)
        for _ in range(2):
            other.refresh(name)
    add(one, "more", "a")
    other.refresh("a")
    delete(one, "b")
    other.refresh("b")
    counts = other.state().counts
    assert counts.pop("fetch_seconds") > 0
    assert counts == {
        "requests_get": 2 * 2 + 2 * 2 + (2 + 1) + 2,
        "looks_changed": 3,
        "looks_same": 4,
        "looks_gone": 1,
        "hits": 6,
        "fetches": 3,
        "fetched_bytes": sum(sizes) + len(one.read("a").file),
        "evictions": 0,
    }


def test_the_budget_holds_between_machines(machines):
    stores = [machines.store("one", stale=0.0), machines.store("other", stale=0.0)]
    one_set = made().total_memory_bytes()

    def work(number):
        store = stores[number % 2]

        def check():
            if store.sums("").held_bytes + one_set > 5 * one_set:
                raise MemoryBudgetError("full")

        for _ in range(20):
            try:
                create(store, f"s{number}", check)
                return True
            except ChangedMeanwhileError:
                continue
            except MemoryBudgetError:
                return False
        return None

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(work, range(12)))
    assert results.count(True) == 5
    assert results.count(False) == 7
    assert stores[0].sums("").sets == 5


def test_sums_of_starts_are_kept_from_the_first_question_on(machines):
    one, other = machines.store("one", stale=0.0), machines.store("other", stale=0.0)
    for name in ("a-1", "a-2", "b-1"):
        create(one, name)
    assert other.sums("a-").sets == 2
    create(one, "a-3")
    delete(one, "a-1")
    assert other.sums("a-").sets == 2
    assert other.sums("a-", "b-").sets == 3
    assert requests_of(other, lambda: other.sums("a-", "b-", "")) == {"get": 1}, "no listing"


def test_a_write_that_dies_before_its_pointer_leaves_a_blob_and_nothing_else(machines):
    store = machines.store()
    create(store)
    real = store.line.put
    store.line.put = lambda key, *args, **keys: (
        (_ for _ in ()).throw(KeyboardInterrupt) if key == "sets/s" else real(key, *args, **keys)
    )
    with pytest.raises(KeyboardInterrupt):
        add(store, "more")
    other = machines.store("other")
    assert modules_of(other) == {"q_proj"}
    assert other.sums("").adapters == 2, "too high by this set until gc"
    blobs = [one["path"] for chunk in obstore.list(machines.memory, "blobs") for one in chunk]
    assert len(blobs) == 2


def test_an_answer_that_is_lost_is_found_out(machines):
    """The pointer was changed, but whoever changed it does not know."""
    store = machines.store()
    create(store)
    real = obstore.put

    def lossy(target, key, *args, **keys):
        result = real(target, key, *args, **keys)
        if key == "sets/s":
            raise obstore.exceptions.GenericError("the connection was reset")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put", lossy)
        assert add(store, "more").version == 2
    assert modules_of(machines.store("other")) == {"q_proj", "more"}
    assert store.sums("").adapters == 2


def test_a_store_and_the_cache_of_a_different_bucket_are_not_a_cache(tmp_path, machines):
    create(machines.store("one"))
    with pytest.raises(ValueError, match="of the store"):
        Cache(machines.folder / "one", "s3://elsewhere", 1 << 20)
    (tmp_path / "folder" / "sets").mkdir(parents=True)
    with pytest.raises(ValueError, match="folder of a store"):
        Cache(tmp_path / "folder", URL, 1 << 20)

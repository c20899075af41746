"""What the service asks of the records of jobs: in a folder, and in a bucket."""

import threading
from dataclasses import replace

import pytest
from buckets import Machines

from bonsai_lora.errors import SetNotFoundError, StoreUnreachableError
from bonsai_lora.storage import jobs
from bonsai_lora.storage.jobs import JobFolder, decode, encode, failed, forgettable, new_record


@pytest.fixture(params=["folder", "bucket"])
def machines(request, tmp_path):
    """Makes the records as each process has them."""
    if request.param == "folder":
        return lambda: JobFolder(tmp_path / "jobs")
    shared = Machines(tmp_path)
    numbers = iter(range(100))
    return lambda: shared.store(f"machine{next(numbers)}").jobs


def test_what_one_writes_the_others_read(machines):
    one, other = machines(), machines()
    assert other.ids() == []
    records = [new_record("combine", "key") for _ in range(3)]
    for record in records:
        one.add(record)
    assert set(other.ids()) == {record.id for record in records}
    assert other.ids() == sorted(other.ids(), reverse=True)
    assert other.read(records[1].id) == records[1]
    changed = other.update(records[1].id, lambda present: replace(present, state="running"))
    assert one.read(records[1].id) == changed == replace(records[1], state="running")
    assert one.update(records[1].id, lambda present: present) == changed
    assert one.read_result(records[1].id) is None
    one.write_result(records[1].id, {"modules": [1.5] * 1000})
    assert other.read_result(records[1].id) == {"modules": [1.5] * 1000}


def test_unknown_ids(machines):
    one = machines()
    one.add(new_record("combine", "key"))
    for number in ("", "lock", "../sets", "0" * 28):
        assert one.read(number) is None
    assert one.update("0" * 28, lambda present: present) is None


def test_changes_do_not_get_lost(machines):
    record = new_record("combine", "key")
    machines().add(record)

    def count(present):
        return replace(present, progress=present.progress + 1)

    def run():
        own = machines()
        for _ in range(25):
            own.update(record.id, count)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machines().read(record.id).progress == 75


def test_the_same_change_by_two_machines_counts_twice(tmp_path):
    """Both write the same record at the same time, so that one of them has to begin again."""
    shared = Machines(tmp_path)
    one, other = (shared.store(name).jobs for name in ("one", "other"))
    record = new_record("combine", "key")
    one.add(record)
    present = []

    def count(found):
        return replace(found, progress=found.progress + 1)

    def count_late(found):
        present.append(found.progress)
        if len(present) == 1:
            other.update(record.id, count)
        return count(found)

    assert one.update(record.id, count_late).progress == 2
    assert present == [0, 1]


def test_too_many_are_forgotten_with_their_results(machines, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_RECORDS", 2)
    monkeypatch.setattr(jobs, "HEARTBEAT_SECONDS", -1.0)  # whatever is there is idle
    one = machines()
    records = [replace(new_record("combine", "key"), id=f"{place:028x}") for place in range(4)]
    for record in records:
        one.add(record)
        one.write_result(record.id, {})
    assert one.ids() == [records[3].id, records[2].id]
    assert [one.read_result(record.id) for record in records] == [None, None, {}, {}]


def test_a_failed_job_has_the_problem_that_a_request_would_get():
    error = SetNotFoundError("s")
    record = failed(new_record("combine", "key"), error)
    assert (record.state, record.is_finished) == ("failed", True)
    assert record.error == {
        "code": "set_not_found",
        "title": error.title,
        "detail": "there is no set named 's'; GET /v1/sets lists those that exist",
        "set": "s",
    }
    assert decode(encode(record)) == record


def test_what_is_forgotten():
    now = 1e9
    fresh, idle, old = now - 1, now - 100, now - 86_401
    assert forgettable([("a", fresh, 10), ("b", idle, 10), ("c", old, 10)], now) == ["c"]
    large = [("a", fresh, 1 << 29), ("b", fresh, 1), ("c", idle, 1)]
    assert forgettable(large, now) == ["c"]
    many = [(str(place), idle, 0) for place in range(1003)]
    assert forgettable(many, now) == ["1000", "1001", "1002"]


def test_a_key_with_many_jobs_does_not_push_out_those_of_others(monkeypatch):
    monkeypatch.setattr(jobs, "MOST_RECORDS", 50)
    now = 1e9
    mine = [new_record("combine", "mine").id for _ in range(7)]
    theirs = [new_record("combine", "theirs").id for _ in range(60)]
    assert len({one[12:16] for one in mine + theirs}) == 2
    known = [(one, now - 100, 1) for one in [*theirs, *mine]]  # mine are the oldest
    assert forgettable(known, now) == [*theirs[50:], *mine[5:]]
    large = [(theirs[0], now - 100, 1 << 28), (mine[0], now - 100, 1 << 20)]
    assert forgettable(large, now) == []


def test_a_bucket_that_is_away_says_so(tmp_path):
    store = Machines(tmp_path).store()
    record = new_record("combine", "key")
    store.jobs.add(record)
    store.line.is_cut = True
    for ask in (store.jobs.ids, lambda: store.jobs.read(record.id)):
        with pytest.raises(StoreUnreachableError):
            ask()


def test_in_a_bucket_a_change_begins_again_if_somebody_was_faster(tmp_path):
    shared = Machines(tmp_path)
    one, other = shared.store("one").jobs, shared.store("other").jobs
    record = new_record("combine", "key")
    one.add(record)
    seen = []

    def beat(present):
        if not seen:
            other.update(record.id, lambda present: replace(present, is_cancelled=True))
        seen.append(present.is_cancelled)
        return replace(present, progress=0.5)

    assert one.update(record.id, beat) == other.read(record.id)
    assert seen == [False, True]
    assert (other.read(record.id).is_cancelled, other.read(record.id).progress) == (True, 0.5)

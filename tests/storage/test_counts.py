"""Statistics that several processes count together, each in a file of its own."""

import dataclasses

import pytest

from bonsai_lora.storage.counts import CountFile, Counts, count_restart, read_restarts

EARLY, LATE = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def counts(number, last_ms=1000):
    names = [field.name for field in dataclasses.fields(Counts)]
    values = {name: number * (place + 1) for place, name in enumerate(names)}
    return Counts(**values | {"last_ms": last_ms, "vectors": 0})


def test_totals_are_the_sums_over_processes_and_the_last_time(tmp_path):
    first, second = CountFile(tmp_path), CountFile(tmp_path)
    first.add("m", "v1", EARLY, counts(1, last_ms=5000))
    first.add("other", "v1", EARLY, counts(100))
    second.add("m", "v1", EARLY, counts(20, last_ms=3000))
    second.add("m", "v1", EARLY, counts(300, last_ms=4000))
    for reader in (first, second):
        found = reader.read({"m": "v1", "other": "v1", "unknown": "v1"})
        assert found["m"] == counts(321, last_ms=5000)
        assert found["other"] == counts(100)
        assert found["unknown"] == Counts()


def test_new_content_starts_from_zero_and_late_counts_of_the_old_are_dropped(tmp_path):
    file = CountFile(tmp_path)
    file.add("m", "old", EARLY, counts(1))
    file.add("m", "new", LATE, counts(2, last_ms=7000))
    file.add("m", "old", EARLY, counts(4, last_ms=9000))
    file.add("m", "new", LATE, counts(8, last_ms=8000))
    assert file.read({"m": "new"})["m"] == counts(10, last_ms=8000)
    assert file.read({"m": "old"})["m"] == Counts()


@pytest.mark.parametrize("models", [1024, 1025, 2049])
def test_there_is_room_for_any_number_of_models(tmp_path, models):
    file = CountFile(tmp_path)
    for number in range(models):
        file.add(f"m{number}", "v1", EARLY, counts(number))
    found = CountFile(tmp_path).read({f"m{number}": "v1" for number in range(models)})
    assert all(found[f"m{number}"] == counts(number) for number in range(models))


def test_counts_of_a_process_that_is_gone_remain(tmp_path):
    CountFile(tmp_path).add("m", "v1", EARLY, counts(1))
    assert CountFile(tmp_path).read({"m": "v1"})["m"].success_count == 2


def test_restarts_are_counted(tmp_path):
    assert read_restarts(tmp_path) == 0
    for expected in (1, 2, 3):
        count_restart(tmp_path)
        assert read_restarts(tmp_path) == expected

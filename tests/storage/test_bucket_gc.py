"""Pages, the index, and what `gc` does to a bucket; over a bucket in memory."""

import tempfile
from datetime import timedelta

import obstore
import pytest
from buckets import Machines, add, create, delete
from test_bucket_store import put_pointer, requests_of

from bonsai_lora.errors import UnsupportedFeatureError
from bonsai_lora.storage import bucket_listing
from bonsai_lora.storage.bucket_gc import collect
from bonsai_lora.storage.index import Sums
from bonsai_lora.storage.usage import Usage

DAY, NOTHING = timedelta(days=1), timedelta(seconds=-10)
"""Graces: of gc, and of one for which everything is old."""


@pytest.fixture
def machines(tmp_path):
    return Machines(tmp_path)


def keys_in(machines, folder):
    return sorted(one["path"] for chunk in obstore.list(machines.memory, folder) for one in chunk)


def gc(store, grace=DAY):
    with tempfile.NamedTemporaryFile() as file:
        return collect(store.line, file, grace)


def names_of(page):
    return [one.name for one in page.records]


def test_a_page_costs_one_list_and_its_own_pointers(machines):
    one = machines.store()
    for number in range(30):
        create(one, f"s{number:02}")
    other = machines.store("other")

    def page(limit, after="", starts=("",)):
        return names_of(other.page(starts, after=after, base=None, limit=limit))

    assert requests_of(other, lambda: page(10)) == {"list": 1, "get": 10}
    assert requests_of(other, lambda: page(10)) == {"list": 1}, "known by their ETags"
    add(one, "more", "s03")
    assert requests_of(other, lambda: page(10)) == {"list": 1, "get": 1}
    assert page(10) == [f"s{number:02}" for number in range(10)]
    assert page(10, "s25") == ["s26", "s27", "s28", "s29"]
    assert page(3, "s04", ["s0", "s2"]) == ["s05", "s06", "s07"]
    assert page(100, "", ["s0", "s2"]) == [f"s{n:02}" for n in [*range(10), *range(20, 30)]]
    assert page(5, "", ["s29", "t"]) == ["s29"]
    delete(one, "s05")
    put_pointer(machines, lambda _: b"no pointer", "s06")
    assert page(3, "s03") == ["s04", "s07", "s08"]


def test_names_follow_each_other_as_in_a_folder(machines):
    store = machines.store()
    names = sorted(["a", "A", "a-", "a.", "a_", "aa", "a0", "Z", "z", "0"])
    for name in names:
        create(store, name)
    assert names_of(store.page([""], after="", base=None, limit=100)) == names
    for start in ("a", "a-", "a.", "z", "0"):
        found = names_of(store.page([start], after="", base=None, limit=100))
        assert found == [one for one in names if one.startswith(start)]
    for start in ("~", "ä", "a/", "..", ".", "-", "_", "a" * 97):
        assert names_of(store.page([start], after="", base=None, limit=100)) == []
    for after in names:
        found = names_of(store.page([""], after=after, base=None, limit=100))
        assert found == [one for one in names if one > after]


def test_pages_by_base_are_of_the_index_and_say_so(machines, monkeypatch):
    monkeypatch.setattr(bucket_listing, "_REREAD_SECONDS", 0.0)
    one, other = machines.store("one"), machines.store("other")
    for number in range(6):
        create(one, f"s{number}", base=f"base{number % 2}", width=8 + number)

    def by_base(base="base1", limit=10, after=""):
        return other.page([""], after=after, base=base, limit=limit)

    assert by_base().as_of is None
    assert names_of(by_base()) == ["s1", "s3", "s5"], "few enough to be read without an index"
    assert other.largest([""], 2).records == []
    found = gc(other)
    assert found.sums.sets == 6
    create(one, "s7", base="base1")
    page = by_base()
    assert names_of(page) == ["s1", "s3", "s5"]
    assert page.as_of is not None
    assert names_of(by_base(limit=1, after="s1")) == ["s3"]
    assert requests_of(other, by_base) == {"get": 1}
    assert names_of(other.largest([""], 2)) == ["s5", "s4"]
    assert other.page([""], after="", base=None, limit=-1).as_of == page.as_of
    assert "s7" in names_of(other.page([""], after="", base=None, limit=10)), "pages are current"
    gc(other)
    assert names_of(by_base()) == ["s1", "s3", "s5", "s7"]


def test_without_an_index_a_large_store_is_not_read_as_a_whole(machines, monkeypatch):
    monkeypatch.setattr(bucket_listing, "_MOST_UNINDEXED", 3)
    store = machines.store()
    for number in range(4):
        create(store, f"s{number}")
    with pytest.raises(UnsupportedFeatureError, match="bonsai-lora gc"):
        store.page([""], after="", base="base", limit=10)
    gc(store)
    assert len(machines.store("other").page([""], after="", base="base", limit=9).records) == 4


def test_gc_removes_old_blobs_that_no_pointer_names(machines):
    store = machines.store()
    create(store, "a")
    create(store, "b")
    add(store, "more", "a")
    delete(store, "b")
    assert len(keys_in(machines, "blobs")) == 3
    assert gc(store).blobs == 0
    assert len(keys_in(machines, "blobs")) == 3, "younger than the grace"
    found = gc(store, NOTHING)
    assert (found.blobs, found.sums.sets) == (2, 1)
    assert found.blob_bytes > 0
    assert len(keys_in(machines, "blobs")) == 1
    assert machines.store("other").read("a").record.version == 2
    assert gc(store, NOTHING).blobs == 0


def test_gc_removes_no_blob_while_a_pointer_cannot_be_read(machines):
    store = machines.store()
    create(store, "a")
    add(store, "more", "a")
    create(store, "b")
    put_pointer(machines, lambda one: {**one, "format": 2}, "b")
    found = gc(store, NOTHING)
    assert (found.blobs, found.unreadable) == (0, ["b"])
    assert len(keys_in(machines, "blobs")) == 3


def test_gc_keeps_tombstones_where_it_cannot_delete_with_a_condition(machines):
    store = machines.store()
    create(store)
    delete(store)
    found = gc(store, NOTHING)
    assert (found.tombstones, found.kept_tombstones) == (0, 1)
    assert keys_in(machines, "sets") == ["sets/s"]
    assert create(store).version == 2


def test_gc_corrects_the_sums(machines):
    store = machines.store(stale=0.0)
    create(store, "a-1")
    assert store.sums("a-").sets == 1
    Usage(store.line, 0.0, lambda _: Sums()).change("a-2", Sums(1, 5, 5, 20), lambda: None)
    assert store.sums("").adapters == 6
    found = gc(store)
    assert found.is_corrected
    assert (store.sums("").adapters, store.sums("a-").sets) == (1, 1)
    obstore.put(machines.memory, "usage", b"nonsense")
    assert store.sums("").adapters == 1, "counted again"


def test_gc_reads_only_the_pointers_that_have_changed(machines):
    store = machines.store()
    for number in range(20):
        create(store, f"s{number:02}")
    gc(store)
    add(store, "more", "s07")
    costs = requests_of(store, lambda: gc(store))
    assert costs["get"] < 10, costs
    assert gc(store).sums.adapters == 21
    assert len(keys_in(machines, "indexes")) >= 1
    gc(store, NOTHING)
    assert len(keys_in(machines, "indexes")) == 1


def test_a_damaged_index_is_not_fatal(machines):
    one = machines.store()
    create(one)
    gc(one)
    key = keys_in(machines, "indexes")[0]
    whole = bytes(obstore.get(machines.memory, key).bytes())
    for number, damaged in enumerate((bytes(len(whole)), whole[:-8] + bytes(8), None)):
        if damaged is None:
            obstore.delete(machines.memory, key)
        else:
            obstore.put(machines.memory, key, damaged)
        other = machines.store(f"other{number}")
        page = other.page([""], after="", base="base", limit=10)
        assert (names_of(page), page.as_of) == (["s"], None), "as without an index"
        assert other.largest([""], 3).records == []
    assert gc(one).sums.sets == 1
    obstore.put(machines.memory, "index", b"[")
    assert machines.store("third").largest([""], 3).records == []

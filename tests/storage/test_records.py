"""Records of set files: those of earlier releases, and what later releases may write."""

import json
import shutil

import numpy as np
import pytest
from conftest import DATA

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import NewerFormatError, SetNotFoundError
from bonsai_lora.formats import safetensors
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.setfile import RECORD_FORMAT, Source, read_record
from bonsai_lora.storage.store import SetStore

NOW = "2026-01-01T00:00:00.000000Z"
OLD = DATA / "set-files-0.1.0"


def header_of(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def record_of(path):
    return json.loads(header_of(path)[0]["__metadata__"]["bonsai_lora"])


def change_record(path, change):
    """Rewrite the file with what `change` makes of its record."""
    header, data = header_of(path)
    metadata = header["__metadata__"]
    metadata["bonsai_lora"] = json.dumps(change(json.loads(metadata["bonsai_lora"])))
    text = json.dumps(header, separators=(",", ":")).encode()
    path.with_suffix(".new").write_bytes(len(text).to_bytes(8, "little") + text + data)
    path.with_suffix(".new").rename(path)  # as every release writes


def with_keys(**keys):
    return lambda record: {**record, **keys}


@pytest.fixture
def folder(tmp_path):
    """Create a store with the set `s`; return the folder of its files."""
    store = SetStore(tmp_path)
    made = BonsaiLoraSet.new(LoraConfig(rank=2), "base", "s").add_mlp_adapters(8, 16)
    with store.lock("s"):
        store.write(NextVersion(lora_set=made, origin="initialized", now=NOW, previous=None))
    return tmp_path / "sets"


def rewrite(store, name):
    """Write the set again with one adapter more, as a change of it does."""
    with store.lock(name):
        present = store.read(name)
        registry = present.lora_set.registry.add("more", LoraAdapter.new(3, 2, LoraConfig(rank=1)))
        changed = present.lora_set.with_registry(registry)
        return store.write(
            NextVersion(lora_set=changed, origin="mixed", now=NOW, previous=present.record)
        )


@pytest.mark.parametrize(("name", "modules", "rank"), [("made", 2, 2), ("uploaded", 1, 4)])
def test_a_file_of_the_first_release_opens_unchanged(tmp_path, name, modules, rank):
    store = SetStore(tmp_path)
    shutil.copy(OLD / f"{name}.safetensors", tmp_path / "sets")
    path = tmp_path / "sets" / f"{name}.safetensors"
    before, was = path.read_bytes(), record_of(path)
    assert "format" not in was
    stored = store.read(name)
    assert (stored.record.name, stored.record.version) == (name, 1)
    assert stored.record.etag == f'"{was["uid"]}-1"'
    assert store.records() == [stored.record]
    registry = stored.lora_set.registry
    tensors, _ = safetensors.decode(before)
    assert len(registry.adapters) == modules == len(tensors) / 2
    for module, adapter in registry.adapters.items():
        prefix = f"base_model.model.{module}"
        assert adapter.rank == rank
        assert adapter.scaling == stored.record.config.alpha / rank
        assert (adapter.a_matrix == tensors[f"{prefix}.lora_A.weight"]).all()
        assert (adapter.b_matrix == tensors[f"{prefix}.lora_B.weight"]).all()
    assert path.read_bytes() == before
    assert store.bad.reasons() == store.newer_files() == {}
    again = rewrite(store, name)
    assert record_of(path)["format"] == RECORD_FORMAT == 1
    assert (again.record.uid, again.record.version) == (was["uid"], 2)
    assert again.record.created_at == was["created_at"]


def test_a_record_is_written_with_its_format(folder):
    assert record_of(folder / "s.safetensors")["format"] == 1


def test_unknown_keys_are_kept_when_a_set_is_rewritten(folder):
    path = folder / "s.safetensors"
    more = {"pulled": {"from": "hub", "é": [1, 2.5, None]}, "pinned": True}
    change_record(path, with_keys(**more))
    store = SetStore(folder.parent)
    assert store.read("s").record.version == 1
    assert store.bad.reasons() == {}
    for version in (2, 3):
        assert rewrite(store, "s").record.version == version
        record = record_of(path)
        assert {name: record[name] for name in more} == more
        assert record["format"] == 1


@pytest.mark.parametrize("read", ["read", "read_record"])
def test_a_file_in_a_newer_format_is_left_in_place(folder, read):
    path = folder / "s.safetensors"
    # Nothing else of a newer file is understood: not its record's name, its dtypes or its size.
    change_record(path, lambda _: {"format": 2, "names": ["s"], "since": 7})
    path.write_bytes(path.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"Q99"') + b"more")
    before = path.read_bytes()
    store = SetStore(folder.parent)
    for _ in range(2):
        with pytest.raises(NewerFormatError, match="has record format 2 of a newer release") as got:
            getattr(store, read)("s")
        assert got.value.values == {"set": "s", "got": 2, "expected": 1}
    assert store.records() == []
    assert store.newer_files() == {"s": len(before)}
    assert store.bad.reasons() == {}
    assert path.read_bytes() == before
    assert not (folder.parent / "bad").exists()


def test_a_newer_file_that_is_deleted_or_replaced_is_forgotten(folder):
    path = folder / "s.safetensors"
    good = path.read_bytes()
    change_record(path, with_keys(format=2))
    store = SetStore(folder.parent)
    assert (store.records(), list(store.newer_files())) == ([], ["s"])
    path.unlink()
    assert (store.records(), store.newer_files()) == ([], {})
    with pytest.raises(SetNotFoundError):
        store.read("s")
    path.write_bytes(good)
    change_record(path, with_keys(format=3))
    assert (store.records(), list(store.newer_files())) == ([], ["s"])
    path.write_bytes(good)
    assert store.read("s").record.version == 1
    store.listing.compare()  # only a file's own time tells that it was changed in place
    assert (len(store.records()), store.newer_files()) == (1, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_keys(version="1"), "whose version is '1'"),
        (with_keys(version=True), "whose version is true"),
        (with_keys(adapter_count=-1), "whose adapter_count is -1"),
        (with_keys(name=None), "whose name is null"),
        (with_keys(config=[]), "whose config is []"),
        (with_keys(config={"rank": "8", "alpha": 8, "dropout": 0, "target_modules": []}), "rank"),
        (with_keys(config={"rank": 8, "alpha": 8, "dropout": 2, "target_modules": []}), "dropout"),
        (with_keys(config={"rank": 8}), "whose alpha is null"),
        (
            with_keys(config={"rank": 8, "alpha": 8.0, "dropout": 0.0, "target_modules": [1]}),
            "text",
        ),
        (with_keys(format=0), "format 0"),
        (with_keys(format="2"), "format '2'"),
        (with_keys(format=True), "format True"),
        (lambda record: {**record, "uid": [record.pop("uid")]}, "whose uid is ["),
        (with_keys(uid="a\r\nX-Other: 1"), "whose uid is 'a"),
        (with_keys(uid="\u2603"), "whose uid is"),
        (with_keys(uid="a" * 65), "whose uid is"),
        (with_keys(origin="elsewhere"), "whose origin is 'elsewhere'"),
        (with_keys(base_model_name="\ud800"), "whose base_model_name is"),
        (with_keys(version=2**53), "whose version is"),
        (with_keys(total_trainable_params=10**400), "whose total_trainable_params is"),
        (
            with_keys(config={"rank": 8, "alpha": 8, "dropout": 0, "target_modules": ["\udfff"]}),
            "text",
        ),
        (lambda _: [1], "has no record of a set"),
        (lambda _: None, "has no record of a set"),
        (lambda _: {}, "whose name is null"),
    ],
)
def test_a_record_with_wrong_types_is_bad(folder, change, reason):
    change_record(folder / "s.safetensors", change)
    store = SetStore(folder.parent)
    assert store.records() == []
    assert list(store.bad.reasons()) == ["s"]
    assert reason in store.bad.reasons()["s"]
    assert store.newer_files() == {}
    assert list(folder.iterdir()) == []


def ones(*shape, dtype=np.float32):
    return np.ones(shape, dtype)


A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"
BIAS, MAGNITUDE = B.replace("weight", "bias"), "base_model.model.m.lora_magnitude_vector"
GOOD = {A: ones(2, 3), B: ones(5, 2)}


def write_file(folder, tensors, metadata):
    """Write a file of set `s` with the record of the present one."""
    path = folder / "s.safetensors"
    record = record_of(path)
    record["data_bytes"] = sum(one.nbytes for one in tensors.values())
    known = {"bonsai_lora": json.dumps(record), "bonsai_lora_modules": '{"m": [8, 4, "linear"]}'}
    path.write_bytes(safetensors.encode(tensors, known | metadata))
    return SetStore(folder.parent)


@pytest.mark.parametrize("note", ["é" * 9000, "x" + "é" * 9000], ids=["even", "odd"])
def test_the_part_of_a_header_that_is_read_first_may_end_within_a_character(folder, note):
    path = folder / "s.safetensors"
    before = read_record(path)
    header, data = header_of(path)
    header["__metadata__"]["note"] = note
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert read_record(path) == before


def test_a_file_written_by_hand_opens(folder):
    adapter = write_file(folder, GOOD, {}).read("s").lora_set.registry.adapters["m"]
    assert (adapter.rank, adapter.d_in, adapter.d_out, adapter.scaling) == (2, 3, 5, 4)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        # Shapes that are no adapter: code that trusts them reads memory that is not theirs.
        ({A: ones(2, 3), B: ones(5, 1)}, {}),
        ({A: ones(1, 3), B: ones(5, 2)}, {}),
        ({A: ones(6), B: ones(5, 2)}, {}),
        ({A: ones(2, 3, 1), B: ones(5, 2)}, {}),
        ({A: ones(2, 3), B: ones(5)}, {}),
        ({A: ones(2, 3), B: ones()}, {}),
        (GOOD | {BIAS: ones(4)}, {}),
        (GOOD | {MAGNITUDE: ones(1)}, {}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, "4", "linear"]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": ["8", 4, "linear"]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, NaN, "linear"]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, 1e999, "linear"]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, 1%s, "linear"]}' % ("0" * 400)}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, 4, "other"]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, 4, ["linear"]]}'}),
        (GOOD, {"bonsai_lora_modules": '{"m": [8, 4]}'}),
        (GOOD, {"bonsai_lora_modules": '[["m", [8, 4, "linear"]]]'}),
        (GOOD, {"bonsai_lora_modules": "[" * 100_000}),
        (GOOD, {"adapter_config": "[1]"}),
        (GOOD, {"adapter_config": "5"}),
    ],
)
def test_a_file_whose_parts_do_not_fit_together_is_moved_aside(folder, tensors, metadata):
    store = write_file(folder, tensors, metadata)
    with pytest.raises(SetNotFoundError):
        store.read("s")
    assert list(store.bad.reasons()) == ["s"]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"version": 1, "reference": "folder:s", "sha256": "00"}, Source("folder:s", "00")),
        ({"version": 2, "reference": "folder:s", "sha256": "00"}, None),
        ({"version": 1, "reference": "folder:s"}, None),
        ({"version": 1, "reference": 3, "sha256": "00"}, None),
        ("folder:s", None),
    ],
)
def test_a_source_is_that_of_one_version(folder, value, expected):
    """An earlier release keeps the key when it changes the set."""
    change_record(folder / "s.safetensors", with_keys(source=value))
    store = SetStore(folder.parent)
    assert store.read("s").record.source == expected
    assert rewrite(store, "s").record.source is None

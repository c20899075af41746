"""Digests of what was written, and files that another program put into the store."""

import hashlib
import json
import os
import re
import shutil
import threading
import time

import httpx
import numpy as np
import pytest
from conftest import DATA, TINY, serving, upload
from test_records import NOW, change_record, header_of, record_of, rewrite, with_keys

from bonsai_lora.api.app import create_app
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import SetNotFoundError
from bonsai_lora.formats import safetensors
from bonsai_lora.storage import files as files_module
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore
from bonsai_lora.storage.verify import BackgroundCheck


@pytest.fixture
def store(tmp_path):
    store = SetStore(tmp_path)
    made = BonsaiLoraSet.new(LoraConfig(rank=2), "base", "s").add_mlp_adapters(800, 700)
    with store.lock("s"):
        store.write(NextVersion(lora_set=made, origin="initialized", now=NOW, previous=None))
    return store


def path_of(store, name="s"):
    return store.root / "sets" / f"{name}.safetensors"


def flip_last_bit(path):
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))


def sha256_of_data(path):
    return hashlib.sha256(header_of(path)[1]).hexdigest()


def test_the_digest_is_that_of_the_bytes_after_the_header(store):
    """Zeros that are holes of the file count like others."""
    assert store.read("s").record.digest == sha256_of_data(path_of(store))
    rewrite(store, "s")
    assert store.read("s").record.digest == sha256_of_data(path_of(store))
    assert store.verify("s") == store.read("s").record


@pytest.mark.parametrize("kind", ["plain", "dora", "rslora-patterns"])
def test_an_upload_has_its_digest(client, settings, kind):
    assert upload(client, "up", TINY / kind).status_code == 201
    store = SetStore(settings.store_folder())
    record = store.verify("up")
    assert record.digest == sha256_of_data(path_of(store, "up"))


def test_a_changed_bit_is_found_and_the_file_moved_aside(store):
    flip_last_bit(path_of(store))
    before = path_of(store).read_bytes()
    sizes = []
    with pytest.raises(SetNotFoundError):
        store.verify("s", sizes.append)
    assert sum(sizes) == len(header_of_bytes(before))
    assert "is damaged" in store.bad.reasons()["s"]
    (moved,) = (store.root / "bad").glob("s.*.safetensors")
    assert moved.read_bytes() == before
    assert not path_of(store).exists()


def header_of_bytes(content):
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_a_digest_of_an_older_version_counts_as_none(store):
    """An earlier release keeps the key, and changes the tensors and the version."""
    change_record(path_of(store), lambda record: {**record, "version": record["version"] + 1})
    flip_last_bit(path_of(store))
    assert store.verify("s").digest is None
    assert rewrite(store, "s").record.digest == sha256_of_data(path_of(store))


def test_a_file_of_the_first_release_gets_a_digest_when_it_is_written(tmp_path):
    store = SetStore(tmp_path)
    shutil.copy(DATA / "set-files-0.1.0" / "made.safetensors", tmp_path / "sets")
    assert store.verify("made").digest is None
    assert rewrite(store, "made").record.digest == sha256_of_data(path_of(store, "made"))
    assert "digest" not in store.read("made").record.unknown


def test_a_set_is_verified_in_the_background_when_it_is_first_opened(store, settings):
    flip_last_bit(path_of(store))
    known = settings.model_copy(update={"store": str(store.root)})
    with serving(create_app(known)) as url, httpx.Client(base_url=url) as client:
        deadline = time.monotonic() + 20
        while "s" not in client.get("/readyz").json()["bad_files"]:
            assert time.monotonic() < deadline
            client.get("/v1/sets/s/stats")
            time.sleep(0.02)
        assert client.get("/v1/sets/s").status_code == 404


def test_the_background_verifies_each_version_once(store):
    asked, done = [], threading.Event()

    def verify(name, on_piece):
        asked.append(name)
        on_piece(1)
        done.set()

    check = BackgroundCheck(verify)
    record = store.read("s").record
    for _ in range(3):
        check.add(record)
    assert done.wait(10)
    again = rewrite(store, "s").record
    done.clear()
    check.add(again)
    assert done.wait(10)
    assert asked == ["s", "s"]


def put_by_hand(store, change):
    """Write the file of `s` as another program may: other tensors, and no digest."""
    path = path_of(store)
    tensors, metadata = safetensors.decode(path.read_bytes())
    record = json.loads(metadata["bonsai_lora"])
    del record["digest"]
    made = change({name: np.array(array) for name, array in tensors.items()})
    record["data_bytes"] = sum(array.nbytes for array in made.values())
    path.write_bytes(safetensors.encode(made, {**metadata, "bonsai_lora": json.dumps(record)}))


UP_A, UP_B = (f"base_model.model.up_proj.lora_{half}.weight" for half in "AB")


def with_value(value):
    def change(tensors):
        tensors[UP_B][3, 1] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_value(np.nan), "NaN or infinity"),
        (with_value(-np.inf), "NaN or infinity"),
        (lambda tensors: {**tensors, UP_B: tensors[UP_B][:, :1]}, "with the same r"),
        (lambda tensors: {**tensors, UP_A: tensors[UP_A][0]}, "with the same r"),
        (lambda tensors: {**tensors, UP_A: tensors[UP_A].astype(np.float64)}, "is F64"),
        (
            lambda tensors: {
                **tensors,
                UP_A.replace("lora_A.weight", "lora_magnitude_vector"): np.ones(3, np.float32),
            },
            r"magnitude has shape \[3\]",
        ),
    ],
)
def test_a_file_made_by_hand_is_checked_as_an_upload_is(store, change, reason):
    put_by_hand(store, change)
    fresh = SetStore(store.root)
    with pytest.raises(SetNotFoundError):
        fresh.read("s")
    assert fresh.bad.reasons().keys() == {"s"}
    assert re.search(reason, fresh.bad.reasons()["s"])


def test_a_sound_file_made_by_hand_is_served(store):
    put_by_hand(store, lambda tensors: tensors)
    record = SetStore(store.root).read("s").record
    assert record.digest is None
    assert record.name == "s"


def test_a_digest_that_is_not_one_counts_as_none(store):
    for value in (None, 7, {"version": 1}, {"version": 1, "sha256": 3}, "sha256:00"):
        change_record(path_of(store), with_keys(digest=value))
        assert store.read("s").record.digest is None
        assert record_of(path_of(store))["digest"] == value


@pytest.mark.parametrize(
    ("modules", "width", "has_digest", "is_quick"),
    [
        (1, 8, True, True),
        (1, 8, False, True),  # it is checked in a millisecond
        (1, 100_000, True, True),
        (1, 100_000, False, False),  # all of it has to be checked first
        (600, 200, True, False),  # its header is long
    ],
)
def test_a_set_is_opened_at_once_if_that_takes_milliseconds(
    tmp_path, modules, width, has_digest, is_quick
):
    shapes = {f"model.layers.{number}.q_proj": (width, width) for number in range(modules)}
    made = BonsaiLoraSet.new(LoraConfig(rank=2), "base", "s").add_adapters(shapes)
    written = SetStore(tmp_path)
    with written.lock("s"):
        written.write(NextVersion(lora_set=made, origin="initialized", now=NOW, previous=None))
    if not has_digest:
        change_record(path_of(written), with_keys(digest=None))
    store = SetStore(tmp_path)
    assert (store.read_quickly("s") is not None) == is_quick
    opened = store.read("s")
    assert store.read_quickly("s") is opened, "once open, it stays open"


def overwrite(path, change):
    """Write changed content into the same file, as `cp` does."""
    content = bytearray(path.read_bytes())
    change(content)
    with path.open("r+b") as file:
        file.write(content)


def flip(content):
    content[-1] ^= 1


@pytest.mark.parametrize("size", [8, 1 << 19], ids=["short", "long"])
def test_a_file_written_in_place_is_verified_before_it_is_served(settings, size):
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/sets", json={"name": "s", "config": {"rank": 1}})
        client.put("/v1/sets/s/adapters/m", json={"d_in": size, "d_out": size})
        path = app.state.store.root / "sets" / "s.safetensors"
        apply = "/v1/sets/s/adapters/m/apply"
        body = {"inputs": [0] * size}
        first = client.post(apply, json=body).json()
        # The same bytes again are the same set.
        overwrite(path, bytes)
        assert client.post(apply, json=body).json() == first
        overwrite(path, flip)
        assert client.post(apply, json=body).status_code == 404
        assert "is damaged" in client.get("/readyz").json()["bad_files"]["s"]


def test_a_hard_link_is_no_reason_to_verify(tmp_path, store, monkeypatch):
    store.read("s")
    os.link(path_of(store), tmp_path / "link")
    monkeypatch.setattr(files_module, "verify_set_file", None)
    assert store.read("s").record.name == "s"

"""A folder of adapters: imported once, again when a file or the stored set has changed."""

import dataclasses
import json
import shutil
import threading

import numpy as np
import obstore
import pytest
from buckets import Machines
from conftest import DATA, TINY, peft_config, peft_tensors, snapshot

from bonsai_lora.api.app import limits_of
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import StoreUnreachableError
from bonsai_lora.formats import safetensors
from bonsai_lora.service import adapters, gguf_lora, sets
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.sets_folder import import_folder
from bonsai_lora.service.view import SetView
from bonsai_lora.storage.store import SetStore


@pytest.fixture
def store(tmp_path):
    return SetStore(tmp_path / "store")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "adapters"
    made.mkdir()
    return made


@pytest.fixture
def run(store, folder, settings):
    """Import the folder; return what became of each entry."""

    def run(**changes):
        limits = dataclasses.replace(limits_of(settings), **changes)
        found = import_folder(SetView(store, limits), Budget(1 << 30), BaseFolder(None), folder)
        return {one.name: one for one in found}

    return run


def outcomes(found):
    return {name: one.outcome for name, one in found.items()}


def test_an_adapter_is_imported_once(run, store, folder):
    shutil.copytree(TINY / "plain", folder / "plain")
    assert outcomes(run()) == {"plain": "imported"}
    before = snapshot(store)
    assert outcomes(run()) == {"plain": "unchanged"}
    assert snapshot(store) == before
    stored = store.read("plain")
    expected = safetensors.decode((TINY / "plain" / "adapter_model.safetensors").read_bytes())[0]
    found = safetensors.decode(bytes(stored.file))[0]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    # Known by its record alone, also to a process that has just started.
    assert SetStore(store.root).read_record("plain").source == stored.record.source


def test_what_an_upload_would_warn_of_is_named(run, folder):
    shutil.copytree(TINY / "plain", folder / "mine")
    config = json.loads((folder / "mine" / "adapter_config.json").read_text())
    (folder / "mine" / "adapter_config.json").write_text(json.dumps({**config, "lora_dropot": 0}))
    (warning,) = run()["mine"].warnings
    assert "lora_dropot" in warning
    assert run()["mine"].warnings == []


def test_a_changed_file_is_the_next_version(run, store, folder):
    shutil.copytree(TINY / "plain", folder / "mine")
    run()
    config = json.loads((folder / "mine" / "adapter_config.json").read_text())
    (folder / "mine" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 3}))
    assert outcomes(run()) == {"mine": "imported"}
    assert store.read("mine").record.version == 2
    shutil.copy(TINY / "rslora-patterns" / "adapter_config.json", folder / "mine")
    shutil.copy(TINY / "rslora-patterns" / "adapter_model.safetensors", folder / "mine")
    assert outcomes(run()) == {"mine": "imported"}
    assert store.read("mine").record.version == 3


@pytest.mark.parametrize("change", ["base", "delete", "remove"])
def test_a_changed_set_is_imported_again(run, store, folder, settings, change):
    shutil.copytree(TINY / "plain", folder / "plain")
    run()
    view = SetView(store, limits_of(settings))
    if change == "base":
        sets.name_base(view, "plain", "other", lambda _: None)
    elif change == "remove":
        module = store.read("plain").lora_set.registry.module_names()[0]
        adapters.delete_adapter(view, "plain", module, lambda _: None)
    else:
        sets.delete_set(view, "plain", lambda _: None)
    assert outcomes(run()) == {"plain": "imported"}
    assert store.read("plain").record.version == (1 if change == "delete" else 3)
    assert store.read("plain").record.base_model_name == "tiny-qwen3"


def test_every_kind_of_adapter(run, store, folder):
    shutil.copytree(TINY / "plain", folder / "plain")
    mlx = DATA / "mlx" / "lora"
    shutil.copytree(mlx, folder / "from-mlx")
    run()
    (folder / "from-gguf.gguf").write_bytes(
        gguf_bytes(gguf_lora.export_gguf(store.read("plain"), BaseFolder(None), "F32", None))
    )
    assert outcomes(run()) == {
        "plain": "unchanged", "from-mlx": "unchanged", "from-gguf": "imported",
    }  # fmt: skip
    assert outcomes(run()) == dict.fromkeys(("plain", "from-mlx", "from-gguf"), "unchanged")
    origins = {name: store.read(name).record.origin for name in ("plain", "from-mlx", "from-gguf")}
    assert origins == {"plain": "peft", "from-mlx": "mlx", "from-gguf": "gguf"}


def gguf_bytes(file):
    return b"".join(bytes(piece()) for piece in file.pieces(0, file.size_bytes))


def test_what_is_refused_leaves_the_others(run, store, folder, rng):
    shutil.copytree(TINY / "plain", folder / "good")
    shutil.copytree(TINY / "plain", folder / "bad name")
    shutil.copytree(TINY / "plain", folder / "half")
    (folder / "half" / "adapter_model.safetensors").unlink()
    shutil.copytree(TINY / "plain", folder / "other half")
    (folder / "other half" / "adapter_config.json").unlink()
    (folder / "pickled").mkdir()
    (folder / "pickled" / "adapter_config.json").write_text("{}")
    (folder / "pickled" / "adapter_model.safetensors").write_bytes(b"\x80\x02}q\x00.")
    tensors = peft_tensors(rng)
    next(iter(tensors.values()))[0, 0] = np.nan
    (folder / "nan").mkdir()
    (folder / "nan" / "adapter_config.json").write_text(json.dumps(peft_config()))
    (folder / "nan" / "adapter_model.safetensors").write_bytes(safetensors.encode(tensors))
    (folder / "broken.gguf").write_bytes(b"GGUF and nothing else")
    (folder / "notes.txt").write_text("not an adapter")
    (folder / ".hidden").mkdir()
    (folder / "linked").symlink_to(folder / "nowhere")
    found = run()
    assert outcomes(found) == {
        "good": "imported",
        **dict.fromkeys(("bad name", "half", "other half", "pickled", "nan", "broken"), "refused"),
    }
    words = {
        "bad name": "bad name",
        "half": "has adapter_config.json and 0 files of weights",
        "other half": "has no adapter_config.json and 1 file of weights",
        "pickled": "pickle",
        "nan": "NaN",
    }
    assert all(word in found[name].reason for name, word in words.items())
    assert list(snapshot(store)) == ["good.safetensors"]
    assert not [path for path in store.temporary.iterdir() if path.is_file()]


@pytest.mark.parametrize(
    "limit", ["max_upload_bytes", "memory_budget_bytes", "max_rank", "max_modules"]
)
def test_limits_are_those_of_an_upload(run, store, folder, limit):
    shutil.copytree(TINY / "plain", folder / "plain")
    assert outcomes(run(**{limit: 1})) == {"plain": "refused"}
    assert snapshot(store) == {}


def test_a_set_that_somebody_made_is_replaced(run, store, folder, settings):
    view = SetView(store, limits_of(settings))
    sets.create_set(view, Budget(1 << 20), "plain", "", LoraConfig(2, 2.0, 0.0, ()), {})
    shutil.copytree(TINY / "plain", folder / "plain")
    assert outcomes(run()) == {"plain": "imported"}
    assert store.read("plain").record.version == 2


def copies(store):
    return list((store.root / "sets").iterdir())


@pytest.fixture
def machines(tmp_path):
    return Machines(tmp_path / "machines")


@pytest.fixture
def run_in(folder, settings):
    """Import the folder into a store of a bucket; return what became of each entry."""

    def run_in(store):
        found = import_folder(
            SetView(store, limits_of(settings)), Budget(1 << 30), BaseFolder(None), folder
        )
        return {one.name: one for one in found}

    return run_in


def test_in_a_bucket_an_adapter_is_imported_once_for_all_machines(run_in, machines, folder):
    shutil.copytree(TINY / "plain", folder / "plain")
    one, other = machines.store("one"), machines.store("other")
    assert outcomes(run_in(one)) == {"plain": "imported"}
    for store in (one, other, machines.store("one")):
        assert outcomes(run_in(store)) == {"plain": "unchanged"}
        assert store.line.requests["put"] == 0 or store is one
    assert copies(other) == [], "what is unchanged is not fetched"
    assert other.read("plain").record == one.read("plain").record
    shutil.copy(TINY / "rslora-patterns" / "adapter_config.json", folder / "plain")
    shutil.copy(TINY / "rslora-patterns" / "adapter_model.safetensors", folder / "plain")
    assert outcomes(run_in(other)) == {"plain": "imported"}
    assert other.read("plain").record.version == 2


def test_machines_that_start_at_once_import_one_version(run_in, machines, folder):
    for number in range(4):
        shutil.copytree(TINY / "plain", folder / f"s{number}")
    stores = [machines.store(f"m{number}", stale=0.0) for number in range(3)]
    begin, found = threading.Barrier(len(stores)), []

    def start(store):
        begin.wait()
        found.append(outcomes(run_in(store)))

    threads = [threading.Thread(target=start, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in ("s0", "s1", "s2", "s3"):
        assert sorted(one[name] for one in found) == ["imported", "unchanged", "unchanged"]
        assert {store.read(name).record.version for store in stores} == {1}
    assert stores[0].sums("").sets == 4


def test_a_machine_that_was_slower_finds_the_set_unchanged(run_in, machines, folder):
    """Both find no set; one writes it while the other is about to."""
    shutil.copytree(TINY / "plain", folder / "plain")
    one, other = machines.store("one"), machines.store("other")
    swap, is_first = one._swap, [True]

    def slower(*arguments):
        if is_first.pop() if is_first else False:
            assert outcomes(run_in(other)) == {"plain": "imported"}
        return swap(*arguments)

    one._swap = slower
    assert outcomes(run_in(one)) == {"plain": "unchanged"}
    assert one.read("plain").record == other.read("plain").record
    assert one.read("plain").record.version == 1
    assert machines.store("third").sums("").sets == 1


def test_without_the_bucket_nothing_is_imported(run_in, machines, folder):
    shutil.copytree(TINY / "plain", folder / "plain")
    store = machines.store()
    store.line.is_cut = True
    with pytest.raises(StoreUnreachableError):
        run_in(store)
    store.line.is_cut = False
    assert list(obstore.list(machines.memory)) == []
    assert outcomes(run_in(store)) == {"plain": "imported"}

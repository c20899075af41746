"""The client has every operation of the OpenAPI document, and names the fields of its answers."""

import inspect
import json
import re
import typing
from pathlib import Path

import numpy as np
import pytest

import bonsai_lora
from bonsai_lora.client import answers, lab_answers
from bonsai_lora.client.call import Call
from bonsai_lora.client.calls import (
    adapters,
    applying,
    bases,
    inference,
    jobs,
    lab,
    merging,
    sets,
    stats,
)
from bonsai_lora.errors import InvalidNameError

ROOT = Path(__file__).parents[2]
OPENAPI = json.loads((ROOT / "openapi" / "openapi.json").read_text())
MODULES = (adapters, applying, bases, inference, jobs, lab, merging, sets, stats)

X = np.ones((1, 4), np.float32)
CALLS = [
    sets.create_set("s"),
    sets.list_page(),
    sets.get_set("s"),
    sets.upload_set("s", "folder"),
    sets.upload_files("s", {"adapter_config": b"", "adapter_model": b""}),
    sets.upload_tensors("s", {}, {}),
    sets.pull_set("s", "hub:acme/one"),
    sets.change_set("s", base_model_name="b"),
    sets.delete_set("s"),
    sets.get_adapter_config("s"),
    sets.get_adapter_model("s"),
    sets.get_adapter_gguf("s"),
    sets.get_adapter_tensors("s"),
    adapters.list_adapters("s"),
    adapters.get_adapter("s", "m"),
    adapters.put_adapter("s", "m", 4, 4),
    adapters.put_weights("s", "m", X, X),
    adapters.delete_adapter("s", "m"),
    applying.apply("s", "m", X),
    applying.apply_many("s", {"m": X}),
    applying.apply_mixed("m", ["s"], X),
    merging.merge("s", "m", X),
    merging.merge_stream("s", "m", [], dtype="F32"),
    stats.get_set_stats("s"),
    stats.get_stats(),
    stats.estimate(1, 1, 1, 1),
    stats.get_health(),
    stats.get_readiness(),
    stats.get_metrics(),
    lab.combine("s", {"a": 1.0}),
    lab.preview_combine("s", {"a": 1.0}),
    lab.compare(["a", "b"]),
    lab.get_spectrum("s"),
    lab.get_survival("b", "s"),
    lab.start_combine("s", {"a": 1.0}),
    lab.start_compare(["a", "b"]),
    lab.start_spectrum("s"),
    lab.start_extract("s", "b", "t", rank=4),
    lab.start_survival("b", "s"),
    jobs.list_jobs(),
    jobs.get_job("j"),
    jobs.cancel_job("j"),
    bases.list_bases(),
    bases.get_base("b"),
    bases.list_merged_files("b", "s"),
    bases.get_merged_file("b", "s", "f"),
    inference.infer("s", {"x": X}),
    inference.infer("s", {"x": X}, version="1"),
    inference.get_server(),
    inference.get_server_live(),
    inference.get_server_ready(),
    *(
        make("s", version=version)
        for make in (
            inference.get_model,
            inference.get_model_ready,
            inference.get_model_config,
            inference.get_model_statistics,
        )
        for version in (None, "1")
    ),
    inference.get_model_statistics(),
    inference.list_models(),
    inference.load_model("s"),
    inference.unload_model("s"),
    inference.list_regions(),
    inference.list_regions("r"),
    inference.register_region("r", "key", 4),
    inference.unregister_regions(),
    inference.unregister_regions("r"),
]


def operation_of(call):
    """The operation of a call; a path without parameters beats one with them."""
    found = [
        (path.count("{"), item[call.method.lower()]["operationId"])
        for path, item in OPENAPI["paths"].items()
        if call.method.lower() in item
        and re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(path)), call.path)
    ]
    return min(found)[1]


def test_every_operation_has_a_call():
    operations = {one["operationId"] for item in OPENAPI["paths"].values() for one in item.values()}
    assert {operation_of(call) for call in CALLS} == operations


def takes_version(path, operation):
    parameters = (one.get("name") for one in operation.get("parameters", ()))
    return "/versions/" in path or "version" in parameters


def test_every_operation_with_a_version_has_a_call_with_one():
    wanted = {
        operation["operationId"]
        for path, item in OPENAPI["paths"].items()
        for operation in item.values()
        if takes_version(path, operation)
    }
    calls = [
        sets.get_set("s", version=3),
        sets.get_adapter_config("s", version=3),
        sets.get_adapter_model("s", version=3),
        sets.get_adapter_tensors("s", version=3),
        sets.get_adapter_gguf("s", version=3),
        adapters.list_adapters("s", version=3),
        adapters.get_adapter("s", "m", version=3),
        applying.apply("s", "m", X, version=3),
        applying.apply_many("s", {"m": X}, version=3),
        merging.merge("s", "m", X, version=3),
        merging.merge_stream("s", "m", [], dtype="F32", version=3),
        stats.get_set_stats("s", version=3),
        lab.get_spectrum("s", version=3),
        lab.start_spectrum("s", version=3),
        inference.infer("s", {"x": X}, version=3),
        inference.get_model("s", version=3),
        inference.get_model_ready("s", version=3),
        inference.get_model_config("s", version=3),
        inference.get_model_statistics("s", version=3),
    ]
    assert {operation_of(call) for call in calls} == wanted
    for call in calls:
        assert ("version", "3") in call.query or "/versions/3" in call.path


def functions():
    for module in MODULES:
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if make.__module__ == module.__name__ and not name.startswith("_"):
                yield make


HUB = {"get_repository", "list_repository", "resolve", "result_of"}
"""What `pull` asks, and what `wait_for` does with an answer."""


@pytest.mark.parametrize("client", [bonsai_lora.Client, bonsai_lora.AsyncClient])
def test_both_clients_have_every_call_with_its_docstring_and_parameters(client):
    made = {make.__name__: make for make in functions() if make.__name__ not in HUB}
    assert len(made) > 40
    for name, make in made.items():
        method = getattr(client, name)
        assert method.__doc__ == make.__doc__
        own = list(inspect.signature(method).parameters.values())
        assert own[0].name == "self"
        assert own[1:] == list(inspect.signature(make).parameters.values())


def test_every_method_is_documented():
    page = (ROOT / "docs" / "python-client.md").read_text()
    for name, _ in inspect.getmembers(bonsai_lora.Client, inspect.isfunction):
        if not name.startswith("_") and name not in ("send", "stream", "close"):
            assert f"`{name}`" in page


SCHEMAS = {
    "ModuleInfo": answers.ModuleInfo,
    "SetSummary": answers.SetSummary,
    "SetPage": answers.SetPage,
    "SetInfo": answers.SetInfo,
    "ImportedModule": answers.ImportedModule,
    "ImportReport": answers.ImportReport,
    "ModuleStatsInfo": answers.ModuleStats,
    "SetStats": answers.SetStats,
    "StoreStatsInfo": answers.StoreStats,
    "Estimate": answers.Estimate,
    "CombinedModule": lab_answers.CombinedModule,
    "CombineReport": lab_answers.CombineReport,
    "CombinedSet": lab_answers.CombinedSet,
    "ComparedModule": lab_answers.ComparedModule,
    "ComparisonInfo": lab_answers.Comparison,
    "ModuleSpectrum": lab_answers.ModuleSpectrum,
    "SetSpectrum": lab_answers.SetSpectrum,
    "TensorSurvival": lab_answers.TensorSurvival,
    "SurvivalInfo": lab_answers.SetSurvival,
    "ExtractedTensor": lab_answers.ExtractedTensor,
    "ExtractReport": lab_answers.ExtractReport,
    "ExtractedSet": lab_answers.ExtractedSet,
    "Job": lab_answers.Job,
    "JobPage": lab_answers.JobPage,
    "BaseFile": answers.BaseFile,
    "BaseInfo": answers.BaseInfo,
    "BaseList": answers.BaseList,
    "MergedFileInfo": answers.MergedFile,
    "Health": answers.Health,
    "Readiness": answers.Readiness,
    "ServerMetadata": answers.ServerMetadata,
    "TensorMetadata": answers.TensorMetadata,
    "ModelMetadata": answers.ModelMetadata,
    "IndexEntry": answers.IndexEntry,
    "RegionInfo": answers.RegionInfo,
    "ConfigInfo": answers.Config,
    "Config": answers.Config,
    "Attention": answers.Attention,
    "Mlp": answers.Mlp,
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_fields_are_those_of_the_schema(name):
    keys = set(typing.get_type_hints(SCHEMAS[name]))
    assert keys - {"etag"} == set(OPENAPI["components"]["schemas"][name]["properties"]) - {"etag"}


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_change_the_path_is_refused_before_anything_is_sent(name):
    for make in (
        lambda: adapters.delete_adapter("s", name),
        lambda: sets.delete_set(name),
        lambda: bases.get_merged_file("b", "s", f"a/{name}"),
    ):
        with pytest.raises(InvalidNameError, match="is not a name"):
            make()


def test_names_are_quoted():
    assert sets.get_set("a/b?c#d e").path == "/v1/sets/a%2Fb%3Fc%23d%20e"


def test_only_what_changes_nothing_is_safe():
    changing = {operation_of(call) for call in CALLS if not call.is_safe}
    assert changing == {
        *("create_set", "upload_set", "change_set", "delete_set", "put_adapter", "delete_adapter"),
        *("combine_sets", "extract_set", "start_survival", "cancel_job"),
        *("register_shared_memory", "unregister_shared_memory", "unregister_shared_memory_region"),
    }
    assert all(isinstance(call, Call) for call in CALLS)

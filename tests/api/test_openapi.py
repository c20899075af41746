"""The headers, codes and schemas of the OpenAPI document are those of the service."""

import json
import re
from pathlib import Path

import httpx
import pytest
from conftest import TINY, upload

from bonsai_lora.cli.openapi import render

ROOT = Path(__file__).parents[2]
DOCUMENT = json.loads(render())
HEADERS = DOCUMENT["components"]["headers"]
MODULE = "model.layers.0.self_attn.q_proj"
SET = "/v1/sets/plain"
ADAPTER = f"{SET}/adapters/{MODULE}"
MERGED = "/v1/bases/tiny-qwen3/merged/plain"
JSON = {"json": {}}
WEIGHTS = {"lora_A": [[0.0] * 64], "lora_B": [[0.0]] * 128}
FORM = {
    "files": {
        "adapter_config": (TINY / "plain/adapter_config.json").read_bytes(),
        "adapter_model": (TINY / "plain/adapter_model.safetensors").read_bytes(),
    }
}
REQUESTS = [
    ("POST", "/v1/sets", {"json": {"name": "made"}}),
    ("GET", "/v1/sets", {}),
    ("GET", SET, {}),
    ("PUT", SET, FORM),
    ("PUT", "/v1/sets/other", FORM),
    ("PATCH", SET, {"json": {"base_model_name": "tiny-qwen3"}}),
    ("DELETE", "/v1/sets/other", {}),
    ("GET", f"{SET}/adapters", {}),
    ("GET", ADAPTER, {}),
    ("PUT", ADAPTER, {"json": WEIGHTS}),
    ("DELETE", ADAPTER, {}),
    ("POST", f"{ADAPTER}/apply", {"json": {"inputs": [0.0] * 64}}),
    ("POST", f"{ADAPTER}/merge", {"json": {"weights": [[0.0] * 64] * 128}}),
    ("GET", f"{SET}/adapter_config.json", {}),
    ("GET", f"{SET}/adapter_model.safetensors", {}),
    ("GET", f"{SET}/stats", {}),
    ("GET", "/v1/bases", {}),
    ("GET", "/v1/bases/tiny-qwen3", {}),
    ("GET", MERGED, {}),
    ("GET", f"{MERGED}/model-00001-of-00003.safetensors", {}),
    ("GET", "/v2/models/plain", {}),
    ("POST", "/v2/repository/index", {}),
    ("GET", "/healthz", {}),
    ("GET", "/metrics", {}),
]
CONDITIONS = [
    {},
    {"If-Match": '"other"'},
    {"If-None-Match": "*"},
    {"Range": "bytes=0-1"},
    {"Range": "bytes=0-1,5-6"},
    {"Range": "bytes=99999999999-"},
    {"Range": "bytes=0-1", "If-Range": '"other"'},
    {"X-Request-Id": "mine"},
]


def operation_of(method, path):
    """The operation of a request; a path without parameters beats one with them."""
    found = [
        (template.count("{"), template)
        for template, item in DOCUMENT["paths"].items()
        if method.lower() in item
        and re.fullmatch(re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template)), path)
    ]
    return DOCUMENT["paths"][min(found)[1]][method.lower()]


@pytest.mark.parametrize(
    ("method", "path", "content"), REQUESTS, ids=[" ".join(one[:2]) for one in REQUESTS]
)
def test_headers_are_those_that_the_service_reads_and_sends(based, method, path, content):
    assert upload(based, "plain", TINY / "plain").is_success
    if method == "DELETE":
        upload(based, "other", TINY / "plain")
    operation = operation_of(method, path)
    effects = set()
    plain = None
    for headers in CONDITIONS:
        if method == "PUT" and path.endswith("other"):
            based.delete(path)
        answer = based.request(method, path, headers=headers, **content)
        check_response_headers(operation, answer)
        plain = plain or answer.status_code
        if answer.status_code in (206, 304, 412, 416):
            effects.update(headers)
    assert plain < 300
    read = {one["$ref"].rpartition("/")[2] for one in operation["parameters"] if "$ref" in one}
    assert effects <= read
    # An upload to a name that is free, or of what the first request deleted, has nothing to match.
    if not (method == "DELETE" or path.endswith("other")):
        assert read - {"X-Request-Id"} <= effects | {"If-Range"}


def check_response_headers(operation, answer: httpx.Response):
    documented = operation["responses"][str(answer.status_code)]["headers"]
    sent = {name for name in HEADERS if name in answer.headers}
    assert sent <= set(documented), answer.status_code
    required = {name for name in documented if HEADERS[name].get("required")}
    assert required <= sent, answer.status_code


def test_conditions_of_deletions_are_read(based):
    upload(based, "plain", TINY / "plain")
    for path in (SET, ADAPTER):
        for headers in ({"If-Match": '"other"'}, {"If-None-Match": "*"}):
            answer = based.delete(path, headers=headers)
            assert answer.status_code == 412
            check_response_headers(operation_of("DELETE", path), answer)


def test_every_operation_sends_its_request_id():
    for item in DOCUMENT["paths"].values():
        for operation in item.values():
            assert all("X-Request-Id" in one["headers"] for one in operation["responses"].values())
            assert ("503" not in operation["responses"]) or (
                "Retry-After" in operation["responses"]["503"]["headers"]
            )


def test_codes_are_those_of_the_documentation():
    code = DOCUMENT["components"]["schemas"]["Problem"]["properties"]["code"]
    assert "enum" not in code
    documented = re.findall(
        r"^\| \d{3} \| `(\w+)`", (ROOT / "docs/errors.md").read_text(), re.MULTILINE
    )
    assert code["x-extensible-enum"] == sorted(set(documented))


def test_no_default_is_null_and_no_request_field_has_one():
    assert '"default": null' not in json.dumps(DOCUMENT)
    for name in ("CreateSet", "Config", "ApplyRequest", "InferRequest", "WeightedSet"):
        schema = DOCUMENT["components"]["schemas"][name]
        assert not [one for one in schema["properties"].values() if "default" in one]
    rank = DOCUMENT["components"]["schemas"]["Config"]["properties"]["rank"]
    assert rank["description"] == "r; with 0 the adapter changes nothing; default: `8`"


def test_dtypes_are_enumerated():
    found = [
        (path, one["schema"]["enum"])
        for path, item in DOCUMENT["paths"].items()
        for operation in item.values()
        for one in operation["parameters"]
        if one.get("name") == "dtype"
    ]
    gguf, floats = ["F32", "F16", "BF16", "Q8_0"], ["F32", "F16", "BF16"]
    merged = [enum for path, enum in found if "/merged/" in path]
    assert merged == [["F16", "BF16", "F32", "Q8_0"]] * 2
    assert [enum for path, enum in found if path.endswith(".gguf")] == [gguf]
    survival = [enum for path, enum in found if "/survival/" in path]
    assert survival == [["BF16", "F16", "Q8_0", "Q1_0", "Q2_0", "TQ1_0", "TQ2_0"]] * 2
    apart = ("/merged/", ".gguf", "/survival/")
    others = [enum for path, enum in found if not any(one in path for one in apart)]
    assert others == [floats] * 4

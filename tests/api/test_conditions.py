"""If-Match and If-None-Match: every call that changes a set, by every form of the header."""

import httpx
import numpy as np
import pytest
from conftest import assert_problem, peft_config, peft_tensors, serving, snapshot, upload_parts

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

MODULE = "model.layers.0.self_attn.q_proj"
BINARY = {"Content-Type": "application/vnd.safetensors"}
FACTORS = {"lora_A": np.ones((4, 6), np.float32), "lora_B": np.ones((5, 4), np.float32)}


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client and its store, for all cases of this file."""
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("store"))))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, app.state.store


@pytest.fixture(scope="module")
def tags():
    """The tag that the set `s` has, NOW, and one that it had, STALE."""
    return {}


@pytest.fixture
def present(service, tags):
    """The set `s`, made again if the last case changed it."""
    client, store = service
    if client.get("/v1/sets/s").headers.get("etag") != tags.get("NOW", ""):
        client.delete("/v1/sets/s")
        tags["STALE"] = put_set(client, []).headers["etag"]
        tags["NOW"] = put_set(client, []).headers["etag"]
    return client, store, tags


def put_set(client, headers):
    tensors = peft_tensors(np.random.default_rng(1))
    return upload_parts(client, "s", peft_config(), tensors, headers=headers)


def put_module(module, **body):
    path = f"/v1/sets/s/adapters/{module}"
    return lambda client, headers: client.put(path, json=body, headers=headers)


def put_binary(client, headers):
    content = safetensors.encode(FACTORS)
    headers = [*headers, *BINARY.items()]
    return client.put("/v1/sets/s/adapters/other", content=content, headers=headers)


def delete(path):
    return lambda client, headers: client.delete(path, headers=headers)


CHANGES = {
    "upload": put_set,
    "delete": delete("/v1/sets/s"),
    "new module": put_module("other", d_in=2, d_out=2),
    "module replaced": put_module(MODULE, d_in=6, d_out=5),
    "weights as JSON": put_module("other", lora_A=[[1, 2]], lora_B=[[1], [2]]),
    "weights in binary": put_binary,
    "delete module": delete(f"/v1/sets/s/adapters/{MODULE}"),
}

MATCH, NONE = "If-Match", "If-None-Match"
CASES = [
    # header lines; whether the change goes on. NOW and STALE stand for tags of the set.
    ([(MATCH, "NOW")], True),
    ([(MATCH, "*")], True),
    ([(MATCH, '"x", NOW')], True),
    ([(MATCH, 'NOW,"x"')], True),
    ([(MATCH, '"x"'), (MATCH, "NOW")], True),
    ([(MATCH, "NOW"), (MATCH, '"x"')], True),
    ([(MATCH, 'W/"x", NOW')], True),
    ([(MATCH, "STALE")], False),
    ([(MATCH, '"x"')], False),
    ([(MATCH, "W/NOW")], False),
    ([(MATCH, 'W/NOW, "x"')], False),
    ([(MATCH, '"x"'), (MATCH, "W/NOW")], False),
    ([(MATCH, '"x"'), (MATCH, "STALE")], False),
    ([(NONE, '"x"')], True),
    ([(NONE, "STALE")], True),
    ([(NONE, "*")], False),
    ([(NONE, "NOW")], False),
    ([(NONE, "W/NOW")], False),
    ([(NONE, '"x", W/NOW')], False),
    ([(NONE, '"x"'), (NONE, "NOW")], False),
    ([(MATCH, "NOW"), (NONE, '"x"')], True),
    ([(MATCH, "NOW"), (NONE, "*")], False),
    ([(MATCH, '"x"'), (NONE, '"x"')], False),
]


def filled(lines, tags):
    """Header lines with the tags that the set has."""
    for word, tag in tags.items():
        lines = [(name, value.replace(word, tag)) for name, value in lines]
    return lines


def named(value):
    return " & ".join(f"{name}: {text}" for name, text in value) if isinstance(value, list) else ""


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("lines", "goes_on"), CASES, ids=named)
def test_a_change_under_a_condition(present, change, lines, goes_on):
    client, store, tags = present
    before = snapshot(store)
    answer = CHANGES[change](client, filled(lines, tags))
    if goes_on:
        assert answer.is_success, answer.text
        assert snapshot(store) != before
        assert answer.headers.get("etag") not in tags.values()
    else:
        assert_problem(answer, 412, "precondition_failed")
        assert snapshot(store) == before
        assert client.get("/v1/sets/s").headers["etag"] == tags["NOW"]


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([(NONE, "*")], 201),
        ([(NONE, '"x"')], 201),
        ([(MATCH, "*")], 412),
        ([(MATCH, '"x"')], 412),
        ([(MATCH, "*"), (NONE, "*")], 412),
    ],
    ids=named,
)
def test_an_upload_of_a_new_set(service, lines, status):
    client, store = service
    client.delete("/v1/sets/s")
    answer = put_set(client, lines)
    assert answer.status_code == status, answer.text
    assert ("s.safetensors" in snapshot(store)) == (status == 201)


FILES = ["", "/adapter_config.json", "/adapter_model.safetensors"]
KNOWN = [
    ([(NONE, "NOW")], True),
    ([(NONE, "W/NOW")], True),
    ([(NONE, "*")], True),
    ([(NONE, '"x", NOW')], True),
    ([(NONE, '"x",W/NOW , "y"')], True),
    ([(NONE, '"x"'), (NONE, "NOW")], True),
    ([(NONE, '"x"')], False),
    ([(NONE, "STALE")], False),
    ([(NONE, '"x"'), (NONE, '"y"')], False),
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(("lines", "is_known"), KNOWN, ids=named)
def test_what_the_caller_knows_is_not_sent_again(present, file, lines, is_known):
    client, _, tags = present
    path = f"/v1/sets/s{file}"
    whole = client.get(path)
    etag = whole.headers["etag"]
    lines = filled(lines, {"NOW": etag, "STALE": tags["STALE"]})
    for method in ("GET", "HEAD") if file else ("GET",):
        answer = client.request(method, path, headers=lines)
        assert answer.status_code == (304 if is_known else 200)
        assert answer.headers["etag"] == etag
        assert answer.content == (whole.content if method == "GET" and not is_known else b"")


def test_a_known_file_is_304_whatever_range_is_asked_for(present):
    """If-None-Match is looked at before Range (RFC 9110, section 13.2.2)."""
    client, _, _ = present
    path = "/v1/sets/s/adapter_model.safetensors"
    etag = client.get(path).headers["etag"]
    for asked in ("bytes=0-1", "bytes=0-0,2-3", "bytes=999999999-"):
        headers = {"Range": asked, NONE: etag}
        assert client.get(path, headers=headers).status_code == 304

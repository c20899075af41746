"""Commits to `adapters/{set}` as raw requests of the hub's protocol; tests/peers has its clients."""

import base64
import itertools
import json

import httpx
import numpy as np
import pytest
from conftest import (
    TINY,
    assert_problem,
    peft_config,
    peft_tensors,
    serving,
    snapshot,
    upload_parts,
)
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app
from bonsai_lora.api.commits import _Base64
from bonsai_lora.errors import MalformedBodyError
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
NDJSON = {"Content-Type": "application/x-ndjson"}
HEADER = {"key": "header", "value": {"summary": "Upload model", "description": ""}}


def file_line(path, content, **changes):
    text = content if isinstance(content, str) else base64.b64encode(content).decode()
    return {
        "key": "file",
        "value": {"content": text, "path": path, "encoding": "base64", **changes},
    }


def ndjson(*operations):
    return b"".join(json.dumps(one).encode() + b"\n" for one in operations)


def folder_lines(folder=TINY / "plain"):
    return [HEADER, *(file_line(name, (folder / name).read_bytes()) for name in (CONFIG, MODEL))]


def push(client, name, *operations, owner="adapters", revision="main", **options):
    path = f"/api/models/{owner}/{name}/commit/{revision}"
    content = ndjson(*(operations or folder_lines()))
    return client.post(path, **{"content": content, "headers": NDJSON, **options})


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    """A client and the store of one service for all refusals, which leave it empty."""
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("refusing") / "store")))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, app.state.store


def test_a_commit_creates_and_replaces_a_set(client):
    done = push(client, "pushed")
    assert done.status_code == 200, done.text
    body = done.json()
    assert body["commitUrl"] == f"{client.base_url}/adapters/pushed/commit/{body['commitOid']}"
    put = upload_parts(
        client,
        "sent",
        json.loads((TINY / "plain" / CONFIG).read_bytes()),
        safetensors.decode((TINY / "plain" / MODEL).read_bytes())[0],
    ).json()
    own = ("name", "created_at", "updated_at")
    report = {key: value for key, value in body["report"].items() if key not in own}
    assert report == {key: value for key, value in put.items() if key not in own}
    info = client.get("/api/models/adapters/pushed").json()
    assert info["sha"] == body["commitOid"]
    pulled = client.get(f"/adapters/pushed/resolve/main/{MODEL}").content
    expected = safetensors.decode((TINY / "plain" / MODEL).read_bytes())[0]
    found = safetensors.decode(pulled)[0]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[one], expected[one]) for one in found)
    again = push(client, "pushed", *folder_lines(TINY / "rslora-patterns")).json()
    assert again["report"]["version"] == 2
    assert again["commitOid"] != body["commitOid"]


def test_any_pieces_give_the_same_set(client, rng):
    """The body arrives in pieces that end anywhere, and in either order of its files."""
    body = ndjson(*reversed(folder_lines()))
    whole = push(client, "whole").json()["report"]["modules"]
    for number in range(3):
        cuts = sorted({0, len(body), *rng.integers(0, len(body), 200).tolist()})
        pieces = [body[a:b] for a, b in itertools.pairwise(cuts)]
        done = push(client, f"cut-{number}", content=iter(pieces))
        assert done.json()["report"]["modules"] == whole


def test_weights_longer_than_a_configuration_go_to_disk(client, rng):
    tensors = peft_tensors(rng, rank=4, d_in=40_001, d_out=40_003)
    lines = [
        file_line(MODEL, safetensors.encode(tensors)),
        file_line(CONFIG, json.dumps(peft_config()).encode()),
    ]
    assert push(client, "large", HEADER, *lines).status_code == 200
    found = safetensors.decode(client.get(f"/v1/sets/large/{MODEL}").content)[0]
    for name, value in tensors.items():
        assert np.array_equal(found[name], value)


def test_the_parent_commit_is_a_condition(client, store):
    first = push(client, "pushed").json()["commitOid"]
    header = {"key": "header", "value": {"summary": "x", "parentCommit": first}}
    files = folder_lines()[1:]
    assert push(client, "pushed", header, *files).status_code == 200
    before = snapshot(store)
    problem = assert_problem(push(client, "pushed", header, *files), 412, "precondition_failed")
    assert problem["expected"] == client.get("/api/models/adapters/pushed").json()["sha"]
    assert_problem(push(client, "new", header, *files), 412, "precondition_failed")
    assert snapshot(store) == before


def test_a_commit_of_other_files_changes_nothing(client, store):
    assert_problem(push(client, "pushed", HEADER), 422, "invalid_request")
    first = push(client, "pushed").json()["commitOid"]
    before = snapshot(store)
    assert push(client, "pushed", HEADER).json()["commitOid"] == first
    assert snapshot(store) == before


GOOD = folder_lines()
PICKLE = file_line(MODEL, b"\x80\x02}q\x00.")
RAW = {"key": "file", "value": {"content": "e30=", "path": CONFIG, "encoding": "utf-8"}}


@pytest.mark.parametrize(
    ("lines", "status", "code", "words"),
    [
        (GOOD[:2], 422, "invalid_request", MODEL),
        (GOOD[::2], 422, "invalid_request", CONFIG),
        ([*GOOD, GOOD[1]], 422, "invalid_request", "twice"),
        ([*GOOD, GOOD[2]], 422, "invalid_request", "twice"),
        ([*GOOD, file_line("README.md", b"x")], 422, "invalid_request", "README.md"),
        ([*GOOD, file_line(f"sub/{CONFIG}", b"{}")], 422, "invalid_request", "at the top"),
        ([*GOOD, {"key": "deletedFile", "value": {"path": MODEL}}], 422, "invalid_request", "whole"),
        ([GOOD[1], {"key": "lfsFile", "value": {}}], 422, "invalid_request", "lfsFile"),
        ([RAW], 422, "invalid_request", "encoding"),
        ([{"key": "file", "value": {"path": CONFIG, "encoding": "base64"}}], 422, "invalid_request", "no content"),
        ([GOOD[1], file_line(MODEL, "####")], 400, "malformed_body", "base64"),
        ([GOOD[1], file_line(MODEL, "AA==AA==")], 400, "malformed_body", "padding"),
        ([GOOD[1], file_line(MODEL, "AAA")], 400, "malformed_body", "3 characters"),
        ([file_line(CONFIG, b"{}", more={"content": "AAAA"})], 400, "malformed_body", "two contents"),
        ([["header"]], 400, "malformed_body", "line 1"),
        ([{"key": "header", "value": 3}], 400, "malformed_body", "line 1"),
        ([GOOD[1], PICKLE], 422, "unsupported_adapter", "pickle"),
        ([GOOD[1], file_line(MODEL, b"not safetensors, by far")], 400, "malformed_safetensors", ""),
        ([file_line(CONFIG, b"x" * (1 << 20 | 1)), GOOD[2]], 413, "body_too_large", ""),
        ([*[file_line(MODEL, b"\x02" + bytes(7) + b"{}" + bytes(1 << 20))] * 2], 422, "invalid_request", "twice"),
        ([HEADER] * 1025, 422, "invalid_request", "1024 lines"),
        ([{"key": "header", "value": {"summary": "x" * (1 << 20)}}], 413, "body_too_large", ""),
    ],
)  # fmt: skip
def test_refusals_change_nothing(refusing, lines, status, code, words):
    client, store = refusing
    refused = push(client, "pushed", *lines)
    problem = assert_problem(refused, status, code)
    assert words in problem["detail"]
    assert (
        problem["detail"].encode("ascii", "replace").decode() in refused.headers["x-error-message"]
    )
    assert snapshot(store) == {}
    assert not [path for path in store.temporary.iterdir() if path.is_file()]


def test_a_body_that_is_no_commit(refusing):
    client, store = refusing
    cut = ndjson(*GOOD)[:-300]
    assert_problem(push(client, "x", content=cut), 400, "malformed_body")
    assert_problem(push(client, "x", content=b"\xff{\n"), 400, "malformed_body")
    assert_problem(push(client, "x", content=b"[" * 100_000), 400, "malformed_body")
    typed = push(client, "x", headers={"Content-Type": "application/json"})
    assert_problem(typed, 415, "unsupported_media_type")
    packed = push(client, "x", headers={**NDJSON, "Content-Encoding": "gzip"})
    assert_problem(packed, 415, "unsupported_media_type")
    assert snapshot(store) == {}


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"owner": "tiny-qwen3"}, 422, "invalid_request"),
        ({"owner": "bases"}, 422, "invalid_request"),
        ({"revision": "dev"}, 422, "invalid_request"),
        ({"name": "bad name"}, 422, "invalid_name"),
        ({"params": {"create_pr": "1"}}, 422, "invalid_request"),
    ],
)
def test_only_the_main_branch_of_adapters_is_pushed_to(refusing, options, status, code):
    client, store = refusing
    assert_problem(push(client, **{"name": "pushed", **options}), status, code)
    assert snapshot(store) == {}


def test_limits_count_the_files_not_their_base64(settings):
    config, weights = ((TINY / "plain" / name).read_bytes() for name in (CONFIG, MODEL))
    exact = len(config) + len(weights)
    # What a length in the head allows for: base64 of everything, the lines' own text included.
    lines = sum(len(ndjson(one)) for one in folder_lines()) * 3 // 4
    for limit, status in ((exact - 1, 413), (lines, 200)):
        app = create_app(settings.model_copy(update={"max_upload_bytes": limit}))
        with serving(app) as url, httpx.Client(base_url=url) as client:
            assert push(client, "pushed").status_code == status
            chunked = push(client, "chunked", content=iter([ndjson(*folder_lines())]))
            assert chunked.status_code == status
            listed = {"files": [{"path": MODEL, "size": limit + 1}]}
            told = client.post("/api/models/adapters/x/preupload/main", json=listed)
            assert_problem(told, 413, "body_too_large")


def test_space_is_counted_before_it_is_taken(settings):
    body = ndjson(*folder_lines())
    app = create_app(settings.model_copy(update={"max_spill_bytes": 4096}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        assert_problem(push(client, "x"), 507, "store_full")
        assert_problem(push(client, "x", content=iter([body])), 507, "store_full")
        assert app.state.context.spill.reserved_bytes == 0
        assert snapshot(app.state.store) == {}


def test_what_comes_before_a_commit(client):
    wanted = {"name": "pushed", "organization": "adapters", "type": "model"}
    made = client.post("/api/repos/create", json=wanted)
    assert made.json()["url"] == f"{client.base_url}/adapters/pushed"
    assert client.get("/v1/sets").json()["sets"] == []
    card = assert_problem(client.get("/adapters/pushed/resolve/main/README.md"), 404, "not_found")
    assert "README.md" in card["detail"]
    checked = client.post("/api/validate-yaml", json={"content": "# x", "repoType": "model"})
    assert checked.json() == {"errors": [], "warnings": []}
    paths = [CONFIG, MODEL, "README.md", "tokenizer.json", f"sub/{MODEL}"]
    files = [{"path": path, "sample": "eA==", "size": 1} for path in paths]
    answer = client.post("/api/models/adapters/pushed/preupload/main", json={"files": files})
    assert [one["path"] for one in answer.json()["files"]] == paths
    assert [one["shouldIgnore"] for one in answer.json()["files"]] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert {one["uploadMode"] for one in answer.json()["files"]} == {"regular"}
    assert "tokenizer.json" in answer.headers["x-hf-warning"]
    answer = client.post("/api/models/adapters/pushed/preupload/main", json={"files": files[2:]})
    assert "none of these is stored: tokenizer.json, sub/" in answer.headers["x-hf-warning"]
    answer = client.post("/api/models/adapters/pushed/preupload/main", json={"files": files[:3]})
    assert "x-hf-warning" not in answer.headers
    push(client, "pushed")
    exists = client.post("/api/repos/create", json=wanted)
    assert assert_problem(exists, 409, "set_exists")["url"] == f"{client.base_url}/adapters/pushed"


@pytest.mark.parametrize(
    "changes",
    [{"organization": None}, {"organization": "me"}, {"type": "dataset"}, {"name": "a/b"}],
)
def test_other_repositories_cannot_be_created(client, changes):
    wanted = {"name": "pushed", "organization": "adapters", **changes}
    refused = client.post("/api/repos/create", json=wanted)
    assert refused.status_code == 422, refused.text


def test_warnings_of_the_import_are_headers(client, rng):
    tensors = {**peft_tensors(rng), "odd.\N{SNOWMAN}.weight": np.zeros(2, np.float32)}
    put = upload_parts(client, "put", peft_config(), tensors)
    lines = [
        file_line(CONFIG, json.dumps(peft_config(future="x")).encode()),
        file_line(MODEL, safetensors.encode(peft_tensors(rng))),
    ]
    done = push(client, "warned", HEADER, *lines)
    warnings = done.json()["report"]["warnings"]
    found = done.headers.get_list("x-hf-warning")
    assert put.status_code in (200, 201, 422)
    assert len(found) == len(warnings)
    for header, text in zip(found, warnings, strict=True):
        assert text[:300] in header


def test_keys_are_checked(settings, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    own, reader = made.add(), made.add(scopes=["read"])
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    files = {"files": [{"path": MODEL, "size": 1}]}
    wanted = {"name": "umbra.one", "organization": "adapters"}
    with serving(app) as url:
        with caller(url, own) as client:
            assert push(client, "acme.one").status_code == 200
            assert_problem(push(client, "umbra.one"), 403, "name_not_yours")
            preupload = client.post("/api/models/adapters/umbra.one/preupload/main", json=files)
            assert_problem(preupload, 403, "name_not_yours")
            create = client.post("/api/repos/create", json=wanted)
            assert_problem(create, 403, "name_not_yours")
        with caller(url, reader) as client:
            assert_problem(push(client, "acme.two"), 403, "forbidden")
        with httpx.Client(base_url=url) as client:
            refused = push(client, "acme.two")
            assert_problem(refused, 401, "unauthenticated")
            assert refused.headers["x-error-code"] == "RepoNotFound"
        assert [path.stem for path in (app.state.store.root / "sets").iterdir()] == ["acme.one"]


@pytest.mark.parametrize("cut", range(9))
def test_nothing_follows_the_padding_of_base64(cut):
    decoder = _Base64()
    with pytest.raises(MalformedBodyError):
        for piece in (b"AA==AA=="[:cut], b"AA==AA=="[cut:]):
            decoder.feed(piece)


def test_base64_in_single_characters(rng):
    data = rng.bytes(1000)
    decoder = _Base64()
    text = base64.b64encode(data)
    assert b"".join(decoder.feed(text[at : at + 1]) for at in range(len(text))) == data
    decoder.end()

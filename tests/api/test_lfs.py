"""Weights sent by Git LFS before their commit; tests/peers has huggingface_hub's own functions."""

import contextlib
import itertools
import json
import re
import threading
import time
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, peft_config, peft_tensors, serving, snapshot, upload
from keyring import KeysFileMaker, caller
from lfs import (
    CONTENT,
    LFS_TYPE,
    ask,
    assert_refused,
    link_to,
    pointer_line,
    pointing_lines,
    sha256_of,
)
from test_hub_push import CONFIG, HEADER, MODEL, file_line, push

from bonsai_lora.api import keys_file
from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.service.lfs import LINK_SECONDS, Link
from bonsai_lora.service.view import SetView
from bonsai_lora.settings import Settings
from bonsai_lora.storage.staging import Staged


def put(client, link, content=CONTENT, **options):
    return client.put(link, content=content, **options)


def staged_in(store):
    return sorted(f"{one.sha256}.{one.name}" for one in store.staging.listed())


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """A client and the store of one service for all refusals, which leave it empty."""
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("lfs") / "store")))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, app
    assert snapshot(app.state.store) == {}
    assert staged_in(app.state.store) == []


def assert_untouched(app):
    """Check that a refusal left nothing."""
    assert staged_in(app.state.store) == []
    assert not [path for path in app.state.store.temporary.iterdir() if path.is_file()]
    assert app.state.context.spill.reserved_bytes == 0


def test_weights_that_were_sent_before_make_the_same_set(client, store):
    link = link_to(client, "sent")
    assert link.startswith(str(client.base_url))
    assert put(client, link).status_code == 200
    assert staged_in(store) == [f"{sha256_of(CONTENT)}.sent"]
    assert link_to(client, "sent") is None  # it is there
    assert client.get("/v1/sets").json()["sets"] == []
    done = push(client, "sent", *pointing_lines())
    assert done.status_code == 200, done.text
    expected = upload(client, "put", TINY / "plain").json()
    own = ("name", "created_at", "updated_at")
    report = {key: value for key, value in done.json()["report"].items() if key not in own}
    assert report == {key: value for key, value in expected.items() if key not in own}
    sent, whole = (client.get(f"/v1/sets/{name}/{MODEL}").content for name in ("sent", "put"))
    pulled, wanted = safetensors.decode(sent)[0], safetensors.decode(whole)[0]
    assert all(np.array_equal(pulled[one], wanted[one]) for one in wanted)
    assert staged_in(store) == []
    assert store.dropped().count == 0


def test_the_secret_is_the_owners(client, store):
    link_to(client, "x")
    secret = store.root / "staged" / "secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert secret.parent.stat().st_mode & 0o777 == 0o700
    assert len(secret.read_bytes()) == 32


def test_weights_in_pieces_of_any_length_reach_the_disk_whole(client, store, rng):
    content = safetensors.encode(peft_tensors(rng, rank=4, d_in=40_001, d_out=40_003))
    link = link_to(client, "large", content)
    cuts = sorted({0, len(content), *rng.integers(0, len(content), 100).tolist()})
    pieces = (content[a:b] for a, b in itertools.pairwise(cuts))
    assert client.put(link, content=pieces).status_code == 200
    lines = [HEADER, pointer_line(content), file_line(CONFIG, json.dumps(peft_config()).encode())]
    assert push(client, "large", *lines).status_code == 200
    found = safetensors.decode(client.get(f"/v1/sets/large/{MODEL}").content)[0]
    for name, value in safetensors.decode(content)[0].items():
        assert np.array_equal(found[name], value)


def changed(link, **values):
    """Return a link with other values, but the signature that it had."""
    parts = urlsplit(link)
    query = {**dict(parse_qsl(parts.query)), **values}
    kept = {name: value for name, value in query.items() if value is not None}
    return parts._replace(query=urlencode(kept)).geturl()


FORGERIES = {
    "a wrong signature": lambda link: changed(link, signature="0" * 64),
    "no ASCII": lambda link: changed(link, signature="\N{SNOWMAN}"),
    "half of a signature": lambda link: link[:-32],
    "no signature": lambda link: changed(link, signature=None),
    "no key": lambda link: changed(link, key=None),
    "a different key": lambda link: changed(link, key="abcdefgh"),
    "a different size": lambda link: changed(link, size=len(CONTENT) + 1),
    "no number": lambda link: changed(link, size="x"),
    "a long number": lambda link: changed(link, size="9" * 5000),
    "a later end": lambda link: changed(link, expires=int(time.time()) + 10 * LINK_SECONDS),
    "a different file": lambda link: link.replace(sha256_of(CONTENT), "0" * 64),
    "a path": lambda link: link.replace(sha256_of(CONTENT), "..%2F..%2Fsets%2Fx"),
    "a different set": lambda link: link.replace("/x.git/", "/y.git/"),
    "a slash in the name": lambda link: link.replace("/x.git/", "/x%2Fy.git/"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_link_is_good_for_what_it_was_signed_for_and_nothing_else(service, forgery):
    client, app = service
    link = FORGERIES[forgery](link_to(client, "x"))
    message = assert_refused(put(client, link), 403)
    assert "/info/lfs/objects/batch" in message
    assert_untouched(app)


def signed(app, *, key="anyone", seconds=LINK_SECONDS, name="x", content=CONTENT):
    """Return a link as the service signs it."""
    staged = Staged(name, sha256_of(content), len(content))
    link = Link(staged, key, int(time.time()) + seconds)
    values = {"size": len(content), "key": key, "expires": link.expires_at}
    signature = link.signature(SetView(app.state.store, app.state.context.limits))
    query = urlencode({**values, "signature": signature})
    return f"/adapters/{name}.git/info/lfs/objects/{staged.sha256}?{query}"


def test_a_link_expires(service):
    client, app = service
    assert LINK_SECONDS == 900
    [told] = ask(client, "x").json()["objects"]
    assert told["actions"]["upload"]["expires_in"] == LINK_SECONDS
    assert told["authenticated"] is True
    end = int(dict(parse_qsl(urlsplit(told["actions"]["upload"]["href"]).query))["expires"])
    assert time.time() + LINK_SECONDS - 30 < end <= time.time() + LINK_SECONDS
    assert "15 minutes" in assert_refused(put(client, signed(app, seconds=-1)), 403)
    assert_untouched(app)


@pytest.mark.parametrize(
    ("content", "options", "status", "words"),
    [
        (CONTENT + b"x", {}, 422, f"{len(CONTENT) + 1} bytes"),
        (CONTENT[:-1], {}, 422, f"{len(CONTENT) - 1} bytes"),
        (b"", {}, 422, "0 bytes"),
        (CONTENT[:-1] + b"\0", {}, 422, "the SHA-256"),
        (iter([CONTENT, b"x"]), {}, 422, "the body has more"),
        (itertools.repeat(bytes(1 << 16), 1 << 14), {}, 422, "the body has more"),
        (iter([CONTENT[:-1]]), {}, 422, "the SHA-256"),
        (CONTENT, {"headers": {"Content-Encoding": "gzip"}}, 415, "uncompressed"),
    ],
    ids=["longer", "shorter", "empty", "different", "more", "endless", "ends", "compressed"],
)
def test_a_body_that_is_not_the_file_of_the_link_is_refused(
    service, content, options, status, words
):
    client, app = service
    try:
        answer = put(client, link_to(client, "x"), content, **options)
    except (httpx.WriteError, httpx.ReadError):  # refused while it was still sending
        assert not isinstance(content, bytes)
    else:
        assert words in assert_refused(answer, status)
    assert_untouched(app)


def test_a_link_for_a_name_that_no_set_can_have(service):
    client, app = service
    for name in ("a%2Fb", "..%2Fb", "-a", "stats"):
        assert_refused(ask(client, name), 422)
        unquoted = name.replace("%2F", "/")
        link = signed(app, name=unquoted).replace(unquoted, name)
        assert put(client, link).status_code in (403, 422)
    assert_untouched(app)


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"operation": "download"}, 501, MODEL),
        ({"transfers": ["multipart", "xet"]}, 422, "'basic'"),
        ({"hash_algo": "sha512"}, 422, "'sha512'"),
        ({"objects": [{"oid": "0" * 64, "size": 1}] * 257}, 422, "objects"),
        ({"objects": [{"oid": "0" * 64, "size": -1}]}, 422, "size"),
        ({"objects": [{"oid": "0" * 64, "size": 1 << 60}]}, 422, "size"),
        ({"objects": [{"size": 1}]}, 422, "oid"),
        ({"objects": None}, 422, "objects"),
        ({"headers": {"Content-Type": "application/json"}}, 415, LFS_TYPE),
        ({"headers": {"Content-Encoding": "gzip"}}, 415, "uncompressed"),
    ],
)
def test_a_batch_that_is_refused_as_a_whole(service, changes, status, words):
    client, app = service
    assert words in assert_refused(ask(client, "x", **changes), status)
    assert_untouched(app)


def test_a_batch_as_git_lfs_sends_it(service):
    client, _ = service
    typed = {"Content-Type": f"{LFS_TYPE}; charset=utf-8"}
    objects = [{"oid": sha256_of(CONTENT), "size": len(CONTENT)}]
    body = {"operation": "upload", "objects": objects, "ref": {"name": "refs/heads/mine"}}
    path = "/adapters/x.git/info/lfs/objects/batch"
    answer = client.post(path, json=body, headers=typed)
    assert answer.json()["transfer"] == "basic"
    assert answer.json()["hash_algo"] == "sha256"
    assert answer.json()["objects"][0]["actions"].keys() == {"upload"}
    assert_refused(client.post(path, content=b"{", headers=typed), 400)
    elsewhere = path.replace("adapters", "tiny-qwen3")
    assert_problem(client.post(elsewhere, json=body, headers=typed), 404, "not_found")


def test_what_is_wrong_with_one_object_is_reported_with_that_one(settings):
    app = create_app(settings.model_copy(update={"max_upload_bytes": len(CONTENT)}))
    objects = [
        {"oid": sha256_of(CONTENT), "size": len(CONTENT)},
        {"oid": sha256_of(CONTENT), "size": len(CONTENT) + 1},
        {"oid": "../secret", "size": 32},
        {"oid": "A" * 64, "size": 1},
    ]
    with serving(app) as url, httpx.Client(base_url=url) as client:
        answer = ask(client, "x", objects=objects)
        found = answer.json()["objects"]
        assert [{"oid": one["oid"], "size": one["size"]} for one in found] == objects
        assert [one.get("error", {}).get("code") for one in found] == [None, 413, 422, 422]
        assert "lower-case hexadecimal" in found[2]["error"]["message"]


def test_two_uploads_of_one_file_at_once(client, store):
    link, halfway = link_to(client, "twice"), threading.Barrier(2, timeout=30)

    def body():
        yield CONTENT[:1000]
        halfway.wait()
        yield CONTENT[1000:]

    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(httpx.put(link, content=body())))
        for _ in range(2)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert [one.status_code for one in answers] == [200, 200]
    assert staged_in(store) == [f"{sha256_of(CONTENT)}.twice"]
    assert push(client, "twice", *pointing_lines()).status_code == 200
    assert not [path for path in store.temporary.iterdir() if path.is_file()]


LINES = pointing_lines()


@pytest.mark.parametrize(
    ("lines", "status", "code", "words"),
    [
        (LINES, 422, "invalid_request", "was not uploaded for 'x'"),
        ([LINES[2]], 422, "invalid_request", CONFIG),
        ([*LINES, LINES[2]], 422, "invalid_request", "twice"),
        ([*LINES, file_line(MODEL, CONTENT)], 422, "invalid_request", "twice"),
        ([*LINES, file_line(MODEL, bytes(2 << 20))], 422, "invalid_request", "twice"),
        ([file_line(MODEL, CONTENT), *LINES], 422, "invalid_request", "twice"),
        ([pointer_line(path=CONFIG)], 422, "invalid_request", "as file"),
        ([pointer_line(content="AAAA")], 422, "invalid_request", "without content"),
        ([pointer_line(content="AAAA" * (1 << 19))], 422, "invalid_request", "without content"),
        ([pointer_line(algo="sha1")], 422, "invalid_request", "algo"),
        ([pointer_line(oid="../secret")], 422, "invalid_request", "oid"),
        ([pointer_line(size=-1)], 422, "invalid_request", "size"),
        ([pointer_line(size=True)], 422, "invalid_request", "size"),
        ([pointer_line(size=None)], 422, "invalid_request", "size"),
        ([pointer_line(size=1 << 60)], 413, "body_too_large", ""),
        ([*LINES[:2], pointer_line(size=1 << 32)], 422, "invalid_request", "was not uploaded"),
    ],
)  # fmt: skip
def test_a_commit_of_what_is_not_there_changes_nothing(service, lines, status, code, words):
    client, app = service
    assert words in assert_problem(push(client, "x", *lines), status, code)["detail"]
    assert_untouched(app)


def test_a_file_is_for_the_set_that_it_was_uploaded_for(client, store):
    assert put(client, link_to(client, "one")).status_code == 200
    assert link_to(client, "two") is not None
    refused = push(client, "two", *pointing_lines())
    assert_problem(refused, 422, "invalid_request")
    assert snapshot(store) == {}
    shorter = [*LINES[:2], pointer_line(size=len(CONTENT) - 1)]
    assert_problem(push(client, "one", *shorter), 422, "invalid_request")
    assert push(client, "one", *pointing_lines()).status_code == 200


def test_a_file_that_was_damaged_where_it_waits_is_not_imported(client, store):
    assert put(client, link_to(client, "x")).status_code == 200
    [path] = (one for one in (store.root / "staged").iterdir() if one.name != "secret")
    path.write_bytes(CONTENT[:-1] + b"\0")
    assert_problem(push(client, "x", *pointing_lines()), 422, "invalid_request")
    assert snapshot(store) == {}


def test_an_adapter_is_refused_for_the_same_reasons_as_in_an_upload(client, store, rng):
    tensors = peft_tensors(rng)
    tensors[next(iter(tensors))][0, 0] = np.nan
    bad = {
        "unsupported_adapter": b"\x80\x02}q\x00.",
        "malformed_safetensors": b"not safetensors, by far",
        "invalid_adapter": safetensors.encode(tensors),
    }
    for code, content in bad.items():
        assert put(client, link_to(client, "x", content), content).status_code == 200
        refused = push(client, "x", *pointing_lines(content))
        assert refused.json()["code"] == code, refused.text
        assert link_to(client, "x", content) is None  # it waits for a commit that is right
    assert snapshot(store) == {}
    stale = {"key": "header", "value": {"summary": "x", "parentCommit": "0" * 40}}
    put(client, link_to(client, "x"))
    assert_problem(push(client, "x", stale, *pointing_lines()[1:]), 412, "precondition_failed")
    assert push(client, "x", *pointing_lines()).status_code == 200


def test_what_waits_is_counted(settings, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    own = made.add()
    small = made.add(prefixes=["small."], quota={"bytes": len(CONTENT)})
    other = made.add(prefixes=["other."])
    whole = made.add(prefixes=[""])
    changes = {"keys_file": made.path, "max_spill_bytes": 6 * len(CONTENT)}
    app = create_app(settings.model_copy(update=changes))
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(serving(app))
        own, small, other, whole = (
            stack.enter_context(caller(url, one)) for one in (own, small, other, whole)
        )
        links = [link_to(small, f"small.{number}") for number in range(2)]
        assert put(small, links[0]).status_code == 200
        assert "quota" in assert_refused(put(small, links[1]), 507)
        [told] = ask(small, "small.2").json()["objects"]
        assert told["error"]["code"] == 507
        # Two and one of six leave three; three would leave two.
        links = [link_to(own, f"acme.{number}") for number in range(3)]
        assert [put(own, one).status_code for one in links] == [200, 200, 507]
        assert [put(own, one).status_code for one in links[:2]] == [200, 200]  # replaces it
        [told] = ask(own, "acme.2").json()["objects"]
        assert f"leave {2 * len(CONTENT)} to other" in told["error"]["message"]
        links = [link_to(whole, f"x.{number}") for number in range(4)]
        assert [put(whole, one).status_code for one in links] == [200, 200, 200, 507]
        [told] = ask(other, "other.1").json()["objects"]
        assert told["error"]["code"] == 507
        assert re.search("max_spill_bytes", told["error"]["message"])
        assert len(staged_in(app.state.store)) == 6
        assert push(own, "acme.0", *pointing_lines()).status_code == 200
        assert push(whole, "x.0", *pointing_lines()).status_code == 200
        assert put(other, link_to(other, "other.1")).status_code == 200
        assert app.state.context.spill.reserved_bytes == 0


def test_keys_that_fill_the_room_for_what_waits_leave_some_to_the_next(settings, tmp_path):
    """Each may have as much as it leaves: one a half, the next a quarter."""
    made = KeysFileMaker(tmp_path / "keys.json")
    tokens = [made.add(prefixes=[f"t{number}."]) for number in range(4)]
    app = create_app(
        settings.model_copy(update={"keys_file": made.path, "max_spill_bytes": 160_000})
    )
    held = []
    with serving(app) as url:
        for number, token in enumerate(tokens):
            with caller(url, token) as client:
                for file in range(20):
                    content = f"{number} {file}".encode().ljust(10_000)
                    ask_for = ask(client, f"t{number}.s", content).json()["objects"][0]
                    if "error" in ask_for:
                        break
                    link = ask_for["actions"]["upload"]["href"]
                    assert put(client, link, content).status_code == 200
                held.append(file)
    assert held == [8, 4, 2, 1]


def test_a_key_has_a_number_of_files_that_may_wait(client, store):
    tiny = [b"%d" % number for number in range(65)]
    for one in tiny[:64]:
        assert put(client, link_to(client, "x", one), one).status_code == 200
    [told] = ask(client, "y", tiny[64]).json()["objects"]
    assert told["error"]["code"] == 507
    assert "64 files" in told["error"]["message"]
    assert len(staged_in(store)) == 64


def test_space_in_use_is_counted_while_it_is_taken(settings):
    app = create_app(settings.model_copy(update={"max_spill_bytes": len(CONTENT)}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        link = link_to(client, "x")
        app.state.context.spill.reserve(1)
        assert_refused(put(client, link), 503)
        app.state.context.spill.release(1)
        assert put(client, link).status_code == 200


@pytest.fixture
def keyed(settings, tmp_path, monkeypatch):
    """A client with a key for `acme.`, its maker, and the service, which sees changes at once."""
    monkeypatch.setattr(keys_file, "CHECK_SECONDS", 0.0)
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add()
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    with serving(app) as url, caller(url, token) as client:
        yield client, made, app


def test_a_link_needs_no_key(keyed):
    client, _, app = keyed
    link = link_to(client, "acme.one")
    with httpx.Client(headers={"Authorization": "Bearer nonsense"}) as nobody:
        answer = put(nobody, link)
        assert answer.status_code == 200
        assert answer.headers["Cache-Control"] == "private"
        for method in ("GET", "POST", "DELETE"):
            assert nobody.request(method, link).status_code == 401
    assert staged_in(app.state.store) == [f"{sha256_of(CONTENT)}.acme.one"]
    assert push(client, "acme.one", *pointing_lines()).status_code == 200


def test_a_batch_needs_one(keyed):
    client, _, _ = keyed
    answer = ask(client, "acme.one", headers={"Authorization": ""})
    assert "no key" in assert_refused(answer, 401)
    assert answer.headers["LFS-Authenticate"] == 'Basic realm="Git LFS"'


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        (None, 401, "no key"),
        ({"prefixes": ["umbra."]}, 403, "may not write to"),
        ({"scopes": ["read"]}, 403, "'write'"),
        ({"expires_at": "2026-01-01T00:00:00Z"}, 401, "has expired"),
        ({"limits": {"requests_per_second": 1e-9}}, 429, "requests_per_second"),
    ],
    ids=["deleted", "prefixes", "scopes", "expired", "rates"],
)
def test_the_key_of_a_link_has_to_be_good_still(keyed, change, status, words):
    client, made, app = keyed
    link = link_to(client, "acme.one")
    if change is None:
        made.entries.clear()
    else:
        made.entries[0].update(change)
    made.write(json.dumps({"keys": made.entries}))
    if "limits" in (change or {}):
        put(client, link)  # takes what there is
    assert words in assert_refused(put(client, link), status)
    assert len(staged_in(app.state.store)) == ("limits" in (change or {}))
    assert not [path for path in app.state.store.temporary.iterdir() if path.is_file()]


def test_workers_of_a_folder_share_links_and_files(settings):
    """Each request may go to a different worker."""
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(create_app(settings))) for _ in range(3)]
        one, two, three = (stack.enter_context(httpx.Client(base_url=url)) for url in urls)
        link = urlsplit(link_to(one, "x"))
        assert put(two, f"{link.path}?{link.query}").status_code == 200
        assert link_to(three, "x") is None
        assert push(three, "x", *pointing_lines()).status_code == 200
        assert link_to(one, "x") is not None
        assert one.get("/v1/sets/x").json()["version"] == 1


def test_a_link_has_the_path_that_a_proxy_removes(settings):
    app = create_app(settings.model_copy(update={"root_path": "/lora"}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        link = link_to(client, "x")
        assert link.startswith(f"{url}/lora/adapters/x.git/info/lfs/objects/")
        assert put(client, link.replace("/lora", "")).status_code == 200


def test_preupload_says_lfs_to_clients_that_ask_for_it(client):
    files = {"files": [{"path": path, "size": 1} for path in (CONFIG, MODEL, "README.md")]}
    path = "/api/models/adapters/x/preupload/main"
    agent = "unknown/None; hf_hub/2.4.0; python/3.11.13"
    for origin, mode in (("", "regular"), ("; origin/lfs", "lfs"), ("; origin/lfsx", "regular")):
        answer = client.post(path, json=files, headers={"User-Agent": agent + origin})
        modes = {one["path"]: one["uploadMode"] for one in answer.json()["files"]}
        assert modes == {CONFIG: "regular", MODEL: mode, "README.md": "regular"}


def test_a_link_is_one_for_each_of_its_values(app):
    """What is signed cannot be cut in a different way."""
    store, base = (
        SetView(app.state.store, app.state.context.limits),
        Link(Staged("a", "1" * 64, 23), "k", 4),
    )
    others = [
        replace(base, staged=Staged("a", "1" * 64, 2), expires_at=34),
        replace(base, key="k4", expires_at=4),
        replace(base, staged=Staged('a", "', "1" * 64, 23)),
    ]
    assert len({one.signature(store) for one in (base, *others)}) == 4

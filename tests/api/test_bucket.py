"""The API over a store in a bucket, which is in memory here; `tests/cluster` has a real server."""

import contextlib
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import obstore
import pytest
from buckets import Line
from conftest import TINY, assert_problem, peft_tensors, serving, upload
from lfs import CONTENT, ask, assert_refused, link_to, pointing_lines, sha256_of
from obstore.store import MemoryStore
from test_hub_push import CONFIG, HEADER, MODEL, file_line, ndjson, push

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.storage import bucket_store, freshness

APPLY = "/v1/sets/s/adapters/m/apply"
ROW = {"inputs": [[1.0, 2.0, 3.0, 4.0]]}


@pytest.fixture
def line(monkeypatch):
    """The way to the bucket, which can be cut."""
    found = Line(MemoryStore())
    monkeypatch.setattr(bucket_store, "open_bucket", lambda _: found)
    return found


@pytest.fixture
def start(line, settings, tmp_path):
    """Makes the application of a machine."""

    def make(name, **changes):
        changes = {"store": "s3://bucket/prefix", "cache": str(tmp_path / name), **changes}
        return create_app(settings.model_copy(update=changes))

    return make


@pytest.fixture
def bucket(start):
    """A client of a service over the bucket."""
    with serving(start("one")) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def create(client, name="s"):
    assert client.post("/v1/sets", json={"name": name}).status_code == 201
    body = {"d_in": 4, "d_out": 4}
    assert client.put(f"/v1/sets/{name}/adapters/m", json=body).status_code == 201


def test_routes_do_what_they_do_over_a_folder(bucket, client):
    for one in (bucket, client):
        create(one)
        assert upload(one, "plain", TINY / "plain").status_code == 201
        assert one.patch("/v1/sets/plain", json={"base_model_name": "b"}).status_code == 200
        create(one, "gone")
        assert one.delete("/v1/sets/gone").status_code == 204
    for path in (
        "/v1/sets/gone",
        "/v1/sets?prefix=p",
        "/v1/sets/plain/adapter_model.safetensors",
        "/v1/sets/plain/adapters",
        "/v2/models/s/ready",
        "/v2/models/s/versions/2",
        "/v2/models/s/versions/3",
        "/v1/sets/s?version=2",
        "/v1/sets/s?version=3",
        "/api/models?author=adapters",
    ):
        answers = [one.get(path) for one in (bucket, client)]
        assert answers[0].status_code == answers[1].status_code, path
    answers = [one.post(APPLY, json=ROW) for one in (bucket, client)]
    assert answers[0].json() == answers[1].json()
    stats = [one.get("/v1/stats").json() for one in (bucket, client)]
    for key in ("set_count", "adapter_count", "total_trainable_params"):
        assert stats[0][key] == stats[1][key]
    names = [
        [set_["name"] for set_ in one.get("/v1/sets").json()["sets"]] for one in (bucket, client)
    ]
    assert names[0] == names[1] == ["plain", "s"]


def test_a_set_stacked_on_others_is_fetched_where_it_may_take_long(start, bucket):
    """The first apply of a machine names sets of which it has no copies."""
    for name in ("s", "t", "u"):
        create(bucket, name)
    with serving(start("other")) as url, httpx.Client(base_url=url, timeout=30) as other:
        body = {**ROW, "sets": [{"set": "t", "weight": 0.5}, {"set": "u", "weight": 2}]}
        answer = other.post(APPLY, json=body)
        assert answer.json() == bucket.post(APPLY, json=body).json()
        assert answer.json()["versions"] == {"s": 2, "t": 2, "u": 2}


def test_a_bucket_that_is_away(start, line, monkeypatch):
    monkeypatch.setattr(freshness, "_RETRY_SECONDS", 0.05)
    app = start("one", stale_seconds=0.1)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        create(client)
        before = client.post(APPLY, json=ROW).json()
        line.is_cut = True
        time.sleep(0.2)
        assert client.post(APPLY, json=ROW).json() == before
        assert client.get("/v1/sets/s").status_code == 200
        for method, path, body in (
            ("POST", "/v1/sets", {"name": "t"}),
            ("PUT", "/v1/sets/s/adapters/n", {"d_in": 4, "d_out": 4}),
            ("DELETE", "/v1/sets/s", None),
            ("PATCH", "/v1/sets/s", {"base_model_name": "b"}),
            ("GET", "/v1/sets/other", None),
            ("GET", "/v1/sets", None),
        ):
            answer = client.request(method, path, json=body)
            assert_problem(answer, 503, "store_unreachable")
            assert answer.headers["retry-after"] == "1"
        assert client.get("/v2/models/other").status_code == 503
        ready = client.get("/readyz").json()
        assert (ready["status"], ready["store"], ready["sets"]) == ("ready", "unreachable", 1)
        metrics = client.get("/metrics").text
        for name in ("stale_served_total", 'store_looks_total{result="failed"}', "cache_bytes"):
            found = re.search(rf"^bonsai_lora_{re.escape(name)} (\S+)", metrics, re.MULTILINE)
            assert float(found[1]) > 0, name
        assert client.get("/v1/stats").json()["set_count"] == 1
        line.is_cut = False
        deadline = time.monotonic() + 5
        while client.get("/readyz").json()["store"] != "reachable":
            client.post(APPLY, json=ROW)
            assert time.monotonic() < deadline
        assert client.get("/v1/sets").json()["sets"][0]["version"] == 2


def test_the_budget_and_quotas_are_of_the_bucket(start, line):
    with (
        serving(start("one", memory_budget_bytes=5000, stale_seconds=0.0)) as one,
        serving(start("other", memory_budget_bytes=5000, stale_seconds=0.0)) as other,
        httpx.Client(base_url=one, timeout=30) as first,
        httpx.Client(base_url=other, timeout=30) as second,
    ):
        create(first)
        body = {"d_in": 64, "d_out": 64}
        assert first.put("/v1/sets/s/adapters/large", json=body).status_code == 201
        create(second, "t")
        answer = second.put("/v1/sets/t/adapters/large", json=body)
        problem = assert_problem(answer, 507, "memory_budget_exceeded")
        assert problem["held_bytes"] == first.get("/v1/stats").json()["total_memory_bytes"] - 256
        assert first.delete("/v1/sets/s").status_code == 204
        assert second.put("/v1/sets/t/adapters/large", json=body).status_code == 201


def keys_in(line):
    return sorted(one["path"] for chunk in obstore.list(line._small) for one in chunk)


def test_each_request_of_a_push_may_go_to_a_different_machine(start, line):
    """Nothing is kept between them: the commit has the whole adapter."""
    files = [{"path": CONFIG, "size": 1}, {"path": MODEL, "size": 1}]
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(start(name))) for name in ("one", "two", "three")]
        one, two, three = (stack.enter_context(httpx.Client(base_url=url)) for url in urls)
        body = {"name": "s", "organization": "adapters"}
        assert one.post("/api/repos/create", json=body).status_code == 200
        path = "/api/models/adapters/s/preupload/main"
        modes = two.post(path, json={"files": files}).json()["files"]
        assert [one["uploadMode"] for one in modes] == ["regular", "regular"]
        assert keys_in(line) == ["usage"]
        done = push(three, "s")
        assert done.status_code == 200, done.text
        for client in (one, two, three):
            assert client.get("/v1/sets/s?version=1").status_code == 200
            assert client.get("/api/models/adapters/s").json()["sha"] == done.json()["commitOid"]


def test_weights_may_be_sent_to_a_different_machine_than_their_commit(start, line):
    with contextlib.ExitStack() as stack:
        urls = [stack.enter_context(serving(start(name))) for name in ("one", "two", "three")]
        one, two, three = (stack.enter_context(httpx.Client(base_url=url)) for url in urls)
        link = urlsplit(link_to(one, "s"))
        assert two.put(f"{link.path}?{link.query}", content=CONTENT).status_code == 200
        assert keys_in(line) == [f"staged/{sha256_of(CONTENT)}.s", "staged/secret", "usage"]
        assert link_to(three, "s") is None
        assert_problem(push(three, "t", *pointing_lines()), 422, "invalid_request")
        done = push(three, "s", *pointing_lines())
        assert done.status_code == 200, done.text
        for client in (one, two, three):
            assert client.get("/v1/sets/s?version=1").status_code == 200
        staged = [key for key in keys_in(line) if key.startswith("staged/")]
        assert staged == ["staged/secret"]


def test_uploads_wait_for_a_bucket_that_is_away(start, line):
    with serving(start("one")) as url, httpx.Client(base_url=url) as client:
        link = link_to(client, "s")
        line.is_cut = True
        assert_refused(ask(client, "s"), 503)
        assert_refused(client.put(link, content=CONTENT), 503)
        line.is_cut = False
        assert client.put(link, content=CONTENT).status_code == 200
        line.is_cut = True
        assert_problem(push(client, "s", *pointing_lines()), 503, "store_unreachable")
        line.is_cut = False
        assert push(client, "s", *pointing_lines()).status_code == 200


def test_an_upload_that_is_aborted_leaves_nothing(start, line, tmp_path):
    content = bytes(8 << 20)
    temporary = tmp_path / "one" / "tmp"
    with serving(start("one")) as url, httpx.Client(base_url=url) as client:
        link = urlsplit(link_to(client, "s", content))
        with socket.create_connection(address_of(url), 10) as sender:
            head = f"PUT {link.path}?{link.query} HTTP/1.1\r\nHost: {address_of(url)[0]}\r\n"
            sender.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
            sender.sendall(content[:-1000])
            eventually(lambda: sum(one.stat().st_size for one in temporary.iterdir()) > 1 << 20)
        eventually(lambda: not [*temporary.iterdir()])
        assert keys_in(line) == ["staged/secret", "usage"]


def test_an_aborted_commit_leaves_nothing(start, line, tmp_path, rng):
    tensors = peft_tensors(rng, rank=4, d_in=200_000, d_out=200_000)
    body = ndjson(HEADER, file_line(MODEL, safetensors.encode(tensors)))
    temporary = tmp_path / "one" / "tmp"
    with serving(start("one")) as url, socket.create_connection(address_of(url), 10) as sender:
        head = f"POST /api/models/adapters/s/commit/main HTTP/1.1\r\nHost: {address_of(url)[0]}\r\n"
        head += f"Content-Type: application/x-ndjson\r\nContent-Length: {len(body)}\r\n\r\n"
        sender.sendall(head.encode() + body[:-1000])
        eventually(lambda: sum(one.stat().st_size for one in temporary.iterdir()) > 1 << 20)
        sender.close()
        eventually(lambda: not [*temporary.iterdir()])
        assert keys_in(line) == ["usage"]
        assert httpx.get(f"{url}/v1/sets/s").status_code == 404


def address_of(url):
    host, _, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def eventually(check):
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_requests_within_the_stale_time_ask_the_bucket_nothing(bucket, line):
    create(bucket)
    bucket.post(APPLY, json=ROW)
    before = dict(line.requests)
    for _ in range(20):
        assert bucket.post(APPLY, json=ROW).status_code == 200
        assert bucket.get("/v1/sets/s/adapter_model.safetensors").status_code == 200
    assert line.requests == before


def test_a_version_that_is_wanted_is_fetched_at_once(start, bucket):
    create(bucket)
    with serving(start("other")) as url, httpx.Client(base_url=url, timeout=30) as other:
        assert other.post(APPLY, json=ROW).json()["version"] == 2
        assert bucket.patch("/v1/sets/s", json={"base_model_name": "b"}).json()["version"] == 3
        assert other.post(APPLY, json=ROW).json()["version"] == 2, "within the stale time"
        assert other.post(f"{APPLY}?version=3", json=ROW).json()["version"] == 3
        assert bucket.patch("/v1/sets/s", json={"base_model_name": "c"}).json()["version"] == 4
        assert other.get("/v1/sets/s?version=4").json()["base_model_name"] == "c"
        assert_problem(other.get("/v1/sets/s?version=5"), 404, "version_not_found")
        assert other.get("/v1/sets/new").status_code == 404
        create(bucket, "new")
        assert other.get("/v1/sets/new").status_code == 404, "within the stale time"
        assert other.get("/v1/sets/new?version=2").status_code == 200

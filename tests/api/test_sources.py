"""Sets pulled by reference: from a second service, a folder, and servers that are hostile."""

import contextlib
import json
import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, serving, snapshot, upload
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app
from bonsai_lora.api.sources_file import read_sources
from bonsai_lora.errors import InvalidRequestError
from bonsai_lora.formats import safetensors
from bonsai_lora.sources import web
from bonsai_lora.sources.origins import Origin, find

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
FILES = {name: (TINY / "plain" / name).read_bytes() for name in (CONFIG, MODEL)}
OPEN = {"allow_private": True, "allow_http": True}


class Handler(BaseHTTPRequestHandler):
    """Answers with `routes[path]`: a body, or a function of the handler."""

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        answer = self.server.routes.get(self.path)
        if answer is None:
            self.send_error(404)
        elif callable(answer):
            with contextlib.suppress(OSError):
                answer(self)
        else:
            self.answer(answer)

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.routes, made.asked = {}, []
    made.url = f"http://127.0.0.1:{made.server_port}"
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def start(settings, tmp_path):
    """Serve with origins; return a client."""
    with contextlib.ExitStack() as stack:

        def start(*sources, **changes):
            path = tmp_path / "sources.json"
            path.write_text(json.dumps({"sources": sources}))
            app = create_app(settings.model_copy(update={"sources": path, **changes}))
            url = stack.enter_context(serving(app))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            client.store = app.state.store
            client.app = app
            return client

        yield start


def pull(client, source, name="pulled", **options):
    return client.put(f"/v1/sets/{name}", json={"source": source}, **options)


def web_origin(server, **more):
    return {"name": "files", "kind": "https", "url": f"{server.url}/loras", **OPEN, **more}


def test_a_host_that_does_not_exist(start):
    client = start({"name": "files", "kind": "https", "url": "https://adapters.invalid"})
    problem = assert_problem(pull(client, "files:a"), 502, "source_unreachable")
    assert "cannot be read (its host name does not resolve); retry later" in problem["detail"]
    assert client.store.list_names() == []


def test_from_the_hub_of_a_second_service(start, tmp_path, settings):
    other = create_app(settings.model_copy(update={"store": str(tmp_path / "other")}))
    with serving(other) as url, httpx.Client(base_url=url) as second:
        assert upload(second, "mine", TINY / "plain").status_code == 201
        commit = second.get("/api/models/adapters/mine").json()["sha"]
        client = start({"name": "hub", "kind": "hub", "url": url, **OPEN})
        made = pull(client, "hub:adapters/mine")
        assert made.status_code == 201, made.text
        assert client.store.read("pulled").record.source.reference == f"hub:adapters/mine@{commit}"
        for reference in (
            "hub:adapters/mine",
            "hub:adapters/mine@main",
            f"hub:adapters/mine@{commit}",
        ):
            again = pull(client, reference)
            assert (again.status_code, again.json()["version"]) == (200, 1)
            assert [one["delta_norm"] for one in again.json()["modules"]] == [
                one["delta_norm"] for one in made.json()["modules"]
            ]
        assert upload(second, "mine", TINY / "rslora-patterns").status_code == 200
        assert_problem(pull(client, f"hub:adapters/mine@{commit}", "x"), 422, "source_refused")
        assert pull(client, "hub:adapters/mine").json()["version"] == 2
        found, expected = (
            safetensors.decode(one.get(f"/v1/sets/{name}/{MODEL}").content)[0]
            for one, name in ((client, "pulled"), (second, "mine"))
        )
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_from_a_web_server(start, server):
    server.routes = {f"/loras/a/b/{name}": body for name, body in FILES.items()}
    client = start(web_origin(server))
    done = pull(client, "files:a/b", params={"base_model_name": "other"})
    assert done.status_code == 201, done.text
    assert done.json()["base_model_name"] == "other"
    assert pull(client, "files:a/b").json()["version"] == 1
    changed = json.loads(FILES[CONFIG]) | {"lora_alpha": 5}
    server.routes[f"/loras/a/b/{CONFIG}"] = json.dumps(changed).encode()
    assert pull(client, "files:a/b", headers={"If-None-Match": "*"}).status_code == 412
    assert pull(client, "files:a/b").json()["version"] == 2
    assert {head["Accept-Encoding"] for _, head in server.asked} == {"identity"}


def test_from_a_folder(start, tmp_path):
    folder = tmp_path / "drop"
    shutil.copytree(TINY / "plain", folder / "team" / "mine")
    (folder / "linked").symlink_to(TINY / "plain")
    (folder / "inner").mkdir()
    (folder / "inner" / CONFIG).symlink_to("/etc/hostname")
    (folder / "inner" / MODEL).mkdir()
    shutil.copytree(TINY / "plain", tmp_path / "outside")
    client = start({"name": "drop", "kind": "file", "path": str(folder)})
    assert pull(client, "drop:team/mine").status_code == 201
    assert pull(client, "drop:team/mine").json()["version"] == 1
    for path in ("linked", "inner", "nothing", "team"):
        assert_problem(pull(client, f"drop:{path}", "x"), 422, "source_refused")
    assert list(snapshot(client.store)) == ["pulled.safetensors"]


@pytest.mark.parametrize(
    "source",
    [
        *("", "files", "files:", ":a", "files:/a", "files:a/", "files:a//b", "files:..", "files:a/../b"),
        *("files:.a", "files:a%2fb", "files:a\\b", "files:a b", "files:a?x=1", "files:a#b", "files:a\nb"),
        *("https://example.com/a", "files:a@", "files:a@../b", "FILES:a", "files:" + "a/" * 8 + "a"),
        "files:a@main",
    ],
)  # fmt: skip
def test_only_references_are_understood(source):
    origins = {"files": Origin("files", "https", url="https://models.example.com")}
    with pytest.raises(InvalidRequestError):
        find(origins, source)


def test_origins_are_those_that_the_operator_named(start, server, client):
    assert_problem(pull(client, "files:a"), 404, "sources_off")
    limited = start(web_origin(server, repositories=["acme/*"]))
    problem = assert_problem(pull(limited, "other:a"), 404, "source_unknown")
    assert problem["expected"] == ["files"]
    assert_problem(pull(limited, "files:umbra/one"), 404, "source_unknown")
    assert server.asked == []
    assert_problem(pull(limited, "files:acme/one"), 422, "source_refused")


def redirect(url, status=302):
    return lambda handler: handler.answer(b"", status, Location=url)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(bytes(1 << 16))


def short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"{}")


def declares_much(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(1 << 60))
    handler.end_headers()


def zipped(handler):
    handler.answer(FILES[CONFIG], Content_Encoding="gzip")


@pytest.mark.parametrize(
    ("answer", "status", "code"),
    [
        (redirect("http://localhost:1/secret"), 422, "source_refused"),
        (redirect("http://169.254.169.254/latest"), 422, "source_refused"),
        (redirect("https://huggingface.co/x"), 422, "source_refused"),
        (redirect("file:///etc/passwd"), 422, "source_refused"),
        (redirect("http://user:pass@127.0.0.1/x"), 422, "source_refused"),
        (redirect("/loras/a/adapter_config.json"), 422, "source_refused"),
        (redirect(""), 422, "source_refused"),
        (endless, 413, "body_too_large"),
        (declares_much, 413, "body_too_large"),
        (short, 502, "source_unreachable"),
        (zipped, 422, "source_refused"),
        (lambda handler: handler.answer(b"no", 500), 502, "source_unreachable"),
        (lambda handler: handler.answer(b"no", 401), 422, "source_refused"),
        (lambda handler: handler.connection.close(), 502, "source_unreachable"),
        (lambda handler: handler.wfile.write(b"not HTTP\r\n\r\n"), 502, "source_unreachable"),
        (b"<!doctype html>", 422, "invalid_adapter"),
    ],
)
def test_a_hostile_server_changes_nothing(start, server, answer, status, code):
    server.routes = {f"/loras/a/{name}": body for name, body in FILES.items()}
    server.routes[f"/loras/a/{CONFIG}"] = answer
    client = start(web_origin(server))
    assert_problem(pull(client, "files:a"), status, code)
    assert snapshot(client.store) == {}
    assert not [path for path in client.store.temporary.iterdir() if path.is_file()]
    assert client.app.state.context.spill.reserved_bytes == 0


def dripping_head(handler):
    for _ in range(400):
        handler.wfile.write(b"H")
        time.sleep(0.05)


def test_a_slow_head_is_given_up(start, server, monkeypatch):
    monkeypatch.setattr(web, "_CONNECT_SECONDS", 0.5)
    server.routes = {f"/loras/a/{CONFIG}": dripping_head}
    client = start(web_origin(server), stall_seconds=1.0)
    started = time.monotonic()
    assert_problem(pull(client, "files:a"), 502, "source_unreachable")
    assert time.monotonic() - started < 5


def test_a_slow_server_is_given_up(start, server):
    def slow(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    server.routes = {f"/loras/a/{CONFIG}": slow}
    client = start(web_origin(server), stall_seconds=1.0)
    started = time.monotonic()
    assert_problem(pull(client, "files:a"), 502, "source_unreachable")
    assert time.monotonic() - started < 5


def test_weights_are_counted_before_they_are_kept(start, server):
    server.routes = {f"/loras/a/{CONFIG}": FILES[CONFIG], f"/loras/a/{MODEL}": endless}
    server.routes |= {f"/loras/b/{CONFIG}": FILES[CONFIG], f"/loras/b/{MODEL}": b"\x80\x02}q\x00."}
    client = start(web_origin(server), max_upload_bytes=1 << 20)
    assert_problem(pull(client, "files:a"), 413, "body_too_large")
    assert_problem(pull(client, "files:b"), 422, "unsupported_adapter")
    tight = start(web_origin(server), max_spill_bytes=1 << 10)
    server.routes[f"/loras/a/{MODEL}"] = FILES[MODEL]
    assert_problem(pull(tight, "files:a"), 507, "store_full")
    assert tight.app.state.context.spill.reserved_bytes == 0


@pytest.mark.parametrize(
    ("address", "is_public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("127.0.0.1", False), ("10.0.0.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False),
        ("::1", False), ("fd00::1", False), ("fe80::1", False), ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False), ("2002:7f00:1::", False), ("2001:0:1::1", False),
    ],
)  # fmt: skip
def test_addresses_inside_the_network_are_refused(monkeypatch, address, is_public):
    """The name of an origin may come to mean any address."""
    asked = []
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 6, "", (address, 443))]
    monkeypatch.setattr(web.socket, "getaddrinfo", lambda *_, **__: found)
    connect = "httpx.Client.send"
    refuse = httpx.ConnectError("not in tests")

    def send(_, request, **__):
        asked.append(request)
        raise refuse

    origin = Origin("files", "https", url="https://models.example.com")
    monkeypatch.setattr(connect, send)
    error = web.SourceUnreachableError if is_public else web.SourceRefusedError
    with pytest.raises(error):
        web.fetch(origin, "https://models.example.com/a", lambda _: None, 10, 1.0)
    assert len(asked) == is_public
    for request in asked:  # it goes to the address that was checked, under the name of the host
        assert request.url.host == address
        assert request.headers["host"] == "models.example.com"
        assert request.extensions["sni_hostname"] == "models.example.com"


def test_a_redirect_to_a_named_host_carries_no_token(start, server, monkeypatch):
    monkeypatch.setenv("TOKEN_OF_TEST", "secret")
    server.routes = {f"/loras/a/{name}": body for name, body in FILES.items()}
    client = start(web_origin(server, token_variable="TOKEN_OF_TEST"))
    assert pull(client, "files:a").status_code == 201
    assert {head["Authorization"] for _, head in server.asked} == {"Bearer secret"}
    origin = client.app.state.context.origins.by_name["files"]
    assert "secret" not in repr(origin)
    with httpx.Client() as own:
        there = web._request(own, origin, "GET", httpx.URL("http://127.0.0.1:1/x"))
    assert "authorization" not in there.headers


def test_a_pull_needs_its_scope(start, server, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    writer, puller = made.add(scopes=["write"]), made.add(scopes=["write", "pull"])
    server.routes = {f"/loras/a/{name}": body for name, body in FILES.items()}
    client = start(web_origin(server), keys_file=made.path)
    with caller(str(client.base_url), writer) as one:
        assert assert_problem(pull(one, "files:a", "acme.x"), 403, "forbidden")["scope"] == "pull"
    with caller(str(client.base_url), puller) as one:
        assert_problem(pull(one, "files:a", "umbra.x"), 403, "name_not_yours")
        assert pull(one, "files:a", "acme.x").status_code == 201


ADDRESS = "https://example.com"


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"kind": "https", "url": "http://example.com"}, r"sources\[0\]: the url 'http://example"),
        ({"kind": "https", "url": "https://u:p@example.com"}, "the url has a password"),
        ({"kind": "https", "url": "http://u:hidden@example.com"}, "the url has a password"),
        ({"kind": "https", "url": "https://u:hidden@ex\u2100.com"}, "the url has a password"),
        ({"kind": "https", "url": f"{ADDRESS}/?t=hidden"}, r"the url 'https://example.com/\?...'"),
        ({"kind": "s3", "url": "s3://u:s/hidden@bucket"}, "the url 's3:...@bucket' must be"),
        ({"kind": "https", "url": "https://example.com/?x"}, "and have no query"),
        ({"kind": "https", "url": 5}, r"sources\[0\]\.url is 5; expected a string"),
        (
            {"name": "A", "kind": "https", "url": ADDRESS},
            r"sources\[0\]\.name is 'A'; expected text",
        ),
        ({"name": "folder", "kind": "https", "url": ADDRESS}, "means the folder of --sets"),
        (
            {"kind": "ftp", "url": "ftp://example.com"},
            r"\[0\]: 'kind' is 'ftp'; expected one of 'hub'",
        ),
        ({"kind": "file"}, r"sources\[0\]\.path: it is missing; add it"),
        ({"kind": "file", "path": "relative"}, "the path 'relative' is relative; make it absolute"),
        ({"kind": "file", "path": "/proc/none"}, "the path '/proc/none' is not a folder"),
        (
            {"kind": "hub", "url": ADDRESS, "token_variable": "NOT_SET"},
            "variable that token_variable of 'a' names is not set",
        ),
        ({"kind": "hub", "url": ADDRESS, "token_variable": "hidden"}, "names is not set"),
        ({"kind": "hub", "url": ADDRESS, "token_variable": ["hidden"]}, ": expected a string"),
        ({"kind": "hub", "url": ADDRESS, "token": "hidden"}, r"\.token: it is unknown; remove it"),
    ],
)
def test_a_bad_sources_file_says_why(tmp_path, entry, text):
    path = tmp_path / "sources.json"
    path.write_text(json.dumps({"sources": [{"name": "a", **entry}]}))
    with pytest.raises(ValueError, match=f"sources file .*{text}") as refused:
        read_sources(path)
    assert "hidden" not in str(refused.value)
    good = {"name": "a", "kind": "https", "url": "https://example.com"}
    path.write_text(json.dumps({"sources": [good, good]}))
    with pytest.raises(ValueError, match="same name"):
        read_sources(path)
    with pytest.raises(
        ValueError, match=r"absent\.json cannot be read: No such file or directory; check"
    ):
        read_sources(tmp_path / "absent.json")


def test_a_secret_that_no_header_can_carry_is_refused_at_the_start(tmp_path, monkeypatch):
    path = tmp_path / "sources.json"
    entry = {"name": "a", "kind": "hub", "url": ADDRESS, "token_variable": "TOKEN_OF_TEST"}
    path.write_text(json.dumps({"sources": [entry]}))
    for secret in ("hidden\n", "hidden\N{SNOWMAN}"):
        monkeypatch.setenv("TOKEN_OF_TEST", secret)
        with pytest.raises(ValueError, match="token_variable of 'a' names has a space") as refused:
            read_sources(path)
        assert "hidden" not in str(refused.value)


@pytest.fixture
def engine(start, server):
    """A client of a service with one adapter to load."""
    server.routes = {f"/loras/a/{name}": body for name, body in FILES.items()}
    return start(web_origin(server))


def test_adapters_are_loaded_as_vllm_does(engine):
    body = {"lora_name": "mine", "lora_path": "files:a"}
    done = engine.post("/v1/load_lora_adapter", json=body)
    assert done.text == "Success: LoRA adapter 'mine' added successfully."
    assert engine.get("/v1/sets/mine").json()["version"] == 1
    assert_problem(engine.post("/v1/load_lora_adapter", json=body), 400, "already_loaded")
    again = engine.post("/v1/load_lora_adapter", json=body | {"load_inplace": True})
    assert again.status_code == 200
    done = engine.post("/v1/unload_lora_adapter", json={"lora_name": "mine", "lora_int_id": 3})
    assert done.text == "Success: LoRA adapter 'mine' removed successfully."
    gone = engine.post("/v1/unload_lora_adapter", json={"lora_name": "mine"})
    assert_problem(gone, 404, "set_not_found")


def test_adapters_are_loaded_as_sglang_does(engine):
    body = {"lora_name": "mine", "lora_path": "files:a", "pinned": True}
    done = engine.post("/load_lora_adapter", json=body)
    assert done.json() == {"success": True, "loaded_adapters": {"mine": "files:a"}}
    assert engine.post("/unload_lora_adapter", json={"lora_name": "mine"}).json()["success"]
    assert engine.get("/v1/sets").json()["sets"] == []


@pytest.mark.parametrize("path", ["/tmp/adapter", "https://evil.example/x", "acme/lora", "../a"])
def test_a_path_of_an_engine_is_no_reference(engine, server, path):
    body = {"lora_name": "mine", "lora_path": path}
    for route in ("/v1/load_lora_adapter", "/load_lora_adapter"):
        assert_problem(engine.post(route, json=body), 422, "invalid_request")
    assert server.asked == []


def test_only_what_was_pulled_is_unloaded(engine):
    assert upload(engine, "sent", TINY / "plain").status_code == 201
    assert pull(engine, "files:a", "pulled").status_code == 201
    engine.patch("/v1/sets/pulled", json={"base_model_name": "other"}).raise_for_status()
    for name in ("sent", "pulled"):
        refused = engine.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert_problem(refused, 409, "not_from_source")
        assert engine.get(f"/v1/sets/{name}").status_code == 200


def test_sets_are_models_of_openai(engine):
    assert pull(engine, "files:a", "one").status_code == 201
    engine.post("/v1/sets", json={"name": "two"})
    found = engine.get("/v1/models").json()
    assert (found["object"], found["has_more"]) == ("list", False)
    assert [(one["id"], one["parent"]) for one in found["data"]] == [
        ("one", "tiny-qwen3"), ("two", None),
    ]  # fmt: skip
    assert all(one["object"] == "model" and one["created"] > 1e9 for one in found["data"])
    first = engine.get("/v1/models?limit=1").json()
    assert first["has_more"]
    assert [one["id"] for one in engine.get("/v1/models?after=one").json()["data"]] == ["two"]


def test_keys_of_engines(start, server, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    writer, puller = made.add(scopes=["write"]), made.add(scopes=["write", "pull", "read"])
    server.routes = {f"/loras/a/{name}": body for name, body in FILES.items()}
    client = start(web_origin(server), keys_file=made.path)
    body = {"lora_name": "acme.x", "lora_path": "files:a"}
    with caller(str(client.base_url), writer) as one:
        assert_problem(one.post("/v1/load_lora_adapter", json=body), 403, "forbidden")
    with caller(str(client.base_url), puller) as one:
        for route in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            other = one.post(route, json=body | {"lora_name": "umbra.x"})
            assert_problem(other, 403, "name_not_yours")
        assert one.post("/v1/load_lora_adapter", json=body).status_code == 200
        assert [found["id"] for found in one.get("/v1/models").json()["data"]] == ["acme.x"]

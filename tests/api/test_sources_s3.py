"""Sets pulled from a bucket: a small server that checks Amazon's signatures stands for it."""

import hashlib
import hmac
import io
import json
import logging
import sys
import time
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from conftest import TINY, assert_problem, snapshot
from test_sources import CONFIG, FILES, MODEL, Handler, pull, redirect, server, start

from bonsai_lora.api.sources_file import read_sources
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.sources import s3, web

__all__ = ["server", "start"]

ACCESS, SECRET, REGION = "AKIATEST", "secret/of+test", "eu-central-1"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCESS_OF_TEST", ACCESS)
    monkeypatch.setenv("SECRET_OF_TEST", SECRET)
    s3._bucket.cache_clear()
    yield
    s3._bucket.cache_clear()


def signature(method, host, path, query):
    """The signature of a presigned request (Signature Version 4, "Authenticating Requests: Using
    Query Parameters" in Amazon's S3 API reference)."""
    fields = dict(query)
    day, scope = fields["X-Amz-Date"][:8], fields["X-Amz-Credential"].partition("/")[2]
    assert scope == f"{day}/{REGION}/s3/aws4_request"
    listed = "&".join(f"{quote(k, '-_.~')}={quote(v, '-_.~')}" for k, v in sorted(query))
    request = f"{method}\n{quote(path)}\n{listed}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
    digest = hashlib.sha256(request.encode()).hexdigest()
    key = f"AWS4{SECRET}".encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{fields['X-Amz-Date']}\n{scope}\n{digest}"):
        key = hmac.digest(key, part.encode(), "sha256")
    return key.hex()


class Objects(Handler):
    """Answers signed requests for `objects[path]`, with their ETags."""

    def do_GET(self):  # noqa: N802 - as the server calls it
        self.serve("GET")

    def do_HEAD(self):  # noqa: N802 - as the server calls it
        self.serve("HEAD")

    def serve(self, method):
        target = urlsplit(self.path)
        query = parse_qsl(target.query, strict_parsing=True)
        given = dict(query).pop("X-Amz-Signature")
        signed = [one for one in query if one[0] != "X-Amz-Signature"]
        self.server.asked.append((method, target.path, dict(self.headers)))
        answer = self.server.routes.get((method, target.path), self.server.routes.get(target.path))
        if signature(method, self.headers["Host"], target.path, signed) != given:
            self.answer(b"", 403)
        elif answer is None:
            self.answer(b"", 404)
        elif callable(answer):
            answer(self)
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.md5(answer).hexdigest()}"')
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(b"" if method == "HEAD" else answer)


@pytest.fixture
def bucket(server):
    server.RequestHandlerClass = Objects
    server.routes = {f"/bucket/loras/acme/sql/{name}": body for name, body in FILES.items()}
    return server


def entry(server, **more):
    return {
        "name": "prod",
        "kind": "s3",
        "url": "s3://bucket/loras/",
        "endpoint": server.url,
        "region": REGION,
        "access_key_variable": "ACCESS_OF_TEST",
        "secret_key_variable": "SECRET_OF_TEST",
        "allow_private": True,
        "allow_http": True,
        **more,
    }


def source_of(client, name="pulled"):
    return client.store.read(name).record.source.reference


def test_an_adapter_is_pulled_at_the_revision_of_its_etags(start, bucket):
    client = start(entry(bucket))
    made = pull(client, "prod:acme/sql")
    assert made.status_code == 201, made.text
    assert made.json()["base_model_name"] == "tiny-qwen3"
    etags = "".join(f'{name} "{hashlib.md5(body).hexdigest()}"\n' for name, body in FILES.items())
    revision = hashlib.sha256(etags.encode()).hexdigest()[:40]
    assert source_of(client) == f"prod:acme/sql@{revision}"
    assert [one[0] for one in bucket.asked] == ["HEAD", "HEAD", "GET", "GET"]
    assert "Authorization" not in {name for *_, head in bucket.asked for name in head}


def test_what_has_not_changed_is_not_read_again(start, bucket):
    client = start(entry(bucket))
    assert pull(client, "prod:acme/sql").status_code == 201
    first = source_of(client)
    bucket.asked.clear()
    for reference in ("prod:acme/sql", first):
        again = pull(client, reference)
        assert (again.status_code, again.json()["version"]) == (200, 1)
    assert {one[0] for one in bucket.asked} == {"HEAD"}
    changed = json.loads(FILES[CONFIG]) | {"lora_alpha": 5}
    bucket.routes[f"/bucket/loras/acme/sql/{CONFIG}"] = json.dumps(changed).encode()
    problem = assert_problem(pull(client, first, "other"), 422, "source_refused")
    assert pull(client, "prod:acme/sql").json()["version"] == 2
    assert source_of(client) in problem["detail"]
    assert list(snapshot(client.store)) == ["pulled.safetensors"]


def test_files_that_are_replaced_during_the_pull_are_not_mixed(start, bucket):
    path = f"/bucket/loras/acme/sql/{MODEL}"
    other = (TINY / "rslora-patterns" / MODEL).read_bytes()
    for method in ("GET", "HEAD"):  # one answer is of the new file, one of the old
        bucket.routes[method, path] = other
        client = start(entry(bucket))
        assert_problem(pull(client, "prod:acme/sql"), 502, "source_unreachable")
        assert snapshot(client.store) == {}
        del bucket.routes[method, path]
    assert pull(client, "prod:acme/sql").status_code == 201


def test_credentials_are_the_operators(start, bucket, monkeypatch):
    own = {"access_key_variable": None, "secret_key_variable": None, "endpoint": ""}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT", bucket.url)
    client = start(entry(bucket, **own))
    assert pull(client, "prod:acme/sql").status_code == 201
    s3._bucket.cache_clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = assert_problem(pull(client, "prod:acme/sql", "b"), 422, "source_refused")
    assert "status 403" in refused["detail"]
    assert SECRET not in repr(client.app.state.context.origins.by_name["prod"])
    s3._bucket.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    problem = assert_problem(pull(client, "prod:acme/sql", "b"), 502, "source_unreachable")
    assert "127.0.0.1" not in problem["detail"]


def test_the_endpoint_obeys_the_rules_of_other_servers(start, bucket, monkeypatch):
    client = start(entry(bucket, allow_private=False))
    problem = assert_problem(pull(client, "prod:acme/sql"), 422, "source_refused")
    assert "allow_private" in problem["detail"]
    monkeypatch.setenv("AWS_ENDPOINT", bucket.url)
    client = start(entry(bucket, endpoint="", allow_http=False))
    problem = assert_problem(pull(client, "prod:acme/sql"), 422, "source_refused")
    assert "allow_http" in problem["detail"]
    assert bucket.asked == []
    client = start(entry(bucket, repositories=["acme/*"]))
    assert_problem(pull(client, "prod:umbra/sql"), 404, "source_unknown")
    assert_problem(pull(client, "prod:acme/../x"), 422, "invalid_request")
    assert bucket.asked == []


def without_etag(handler):
    handler.answer(b"")


def truncated(handler):
    body = FILES[MODEL]
    etag = f'"{hashlib.md5(body).hexdigest()}"'
    handler.answer(body[:-1], ETag=etag, Content_Length=str(len(body)))
    handler.close_connection = True


@pytest.mark.parametrize(
    ("method", "answer", "status", "code"),
    [
        ("HEAD", None, 422, "source_refused"),
        ("HEAD", without_etag, 422, "source_refused"),
        ("HEAD", redirect("http://169.254.169.254/latest"), 422, "source_refused"),
        ("GET", redirect("http://localhost:1/secret", 307), 422, "source_refused"),
        ("GET", lambda handler: handler.answer(b"no", 503), 502, "source_unreachable"),
        ("GET", truncated, 502, "source_unreachable"),
        ("GET", lambda handler: handler.connection.close(), 502, "source_unreachable"),
    ],
)
def test_a_hostile_endpoint_changes_nothing(start, bucket, method, answer, status, code):
    path = f"/bucket/loras/acme/sql/{MODEL}"
    if answer is None:
        del bucket.routes[path]
    else:
        bucket.routes[method, path] = answer
    client = start(entry(bucket))
    assert_problem(pull(client, "prod:acme/sql"), status, code)
    assert snapshot(client.store) == {}
    assert client.app.state.context.spill.reserved_bytes == 0


def test_weights_are_counted_before_they_are_read(start, bucket):
    client = start(entry(bucket), max_upload_bytes=len(FILES[MODEL]) - 1)
    assert_problem(pull(client, "prod:acme/sql"), 413, "body_too_large")
    assert snapshot(client.store) == {}


def test_signed_urls_are_not_logged(start, bucket, monkeypatch):
    log, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(root, "handlers", root.handlers)
    configure_logging("info", "json")
    root.handlers[0].setStream(log)
    client = start(entry(bucket))
    assert pull(client, "prod:acme/sql").status_code == 201
    assert "ready" in log.getvalue()
    assert "X-Amz-Signature" not in log.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"url": "s3://"},
        {"url": "https://bucket"},
        {"url": "s3://bucket/../other"},
        {"url": "s3://user:pass@bucket"},
        {"endpoint": "http://example.com"},
        {"endpoint": "https://u:p@example.com"},
        {"region": "a b"},
        {"secret_key_variable": None},
        {"secret_key_variable": "NOT_SET_HERE"},
        {"secret_key": "secret"},
    ],
)
def test_a_bad_entry_says_why(tmp_path, change):
    good = {
        "name": "a",
        "kind": "s3",
        "url": "s3://bucket/x",
        "access_key_variable": "ACCESS_OF_TEST",
        "secret_key_variable": "SECRET_OF_TEST",
    }
    path = tmp_path / "sources.json"
    path.write_text(json.dumps({"sources": [good]}))
    assert read_sources(path)["a"].credentials == (ACCESS, SECRET)
    path.write_text(json.dumps({"sources": [good | change]}))
    with pytest.raises(ValueError, match="sources file"):
        read_sources(path)


def test_the_documented_file_is_valid(tmp_path, monkeypatch):
    monkeypatch.setenv("ACME_HUB_TOKEN", "token")
    page = (Path(__file__).parents[2] / "docs/security.md").read_text()
    text = page.partition("```json\n")[2].partition("```")[0]
    path = tmp_path / "sources.json"
    path.write_text(text.replace("/srv/adapters", str(tmp_path)))
    assert [one.kind for one in read_sources(path).values()] == ["hub", "https", "s3", "file"]


def test_without_obstore_the_entry_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    path = tmp_path / "sources.json"
    path.write_text(json.dumps({"sources": [{"name": "a", "kind": "s3", "url": "s3://bucket"}]}))
    with pytest.raises(ValueError, match="pip install obstore"):
        read_sources(path)


def test_a_slow_endpoint_is_given_up(start, bucket, monkeypatch):
    def dripping(handler):
        for _ in range(100):
            handler.wfile.write(b"H")
            time.sleep(0.05)

    monkeypatch.setattr(web, "_CONNECT_SECONDS", 0.5)
    bucket.routes["HEAD", f"/bucket/loras/acme/sql/{CONFIG}"] = dripping
    client = start(entry(bucket), stall_seconds=1.0)
    started = time.monotonic()
    assert_problem(pull(client, "prod:acme/sql"), 502, "source_unreachable")
    assert time.monotonic() - started < 4

"""What web pages can make a browser send: refused by the fast lane and the framework alike."""

import httpx
import pytest
from conftest import assert_problem, serving, snapshot
from keyring import KeysFileMaker

from bonsai_lora.api.app import create_app
from bonsai_lora.api.browsers import host_name
from bonsai_lora.cli.main import main
from bonsai_lora.settings import Settings

PAGE = "https://app.example"
APPLY = "/v1/sets/s/adapters/m/apply"
JSON = {"Content-Type": "application/json"}
BODY = b'{"inputs": [[1.0, 2.0]]}'
INFER = b'{"inputs": [{"name": "m", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}'


@pytest.fixture(scope="module", params=["auto", "off"], ids=["lane", "framework"])
def site(request, tmp_path_factory):
    settings = Settings(
        store=str(tmp_path_factory.mktemp("store")),
        fast_lane=request.param,
        allowed_hosts="lora.example, Other.Example",
        cors_origins=PAGE,
        trusted_proxies="127.0.0.0/8",
    )
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.post("/v1/sets", json={"name": "s"})
        client.put("/v1/sets/s/adapters/m", json={"d_in": 2, "d_out": 2})
        client.app = app
        yield client


HOSTS = {
    "localhost": 200,
    "LOCALHOST:80": 200,
    "127.0.0.1": 200,
    "127.0.0.1:9999": 200,
    "192.0.2.7": 200,
    "[::1]": 200,
    "[2001:db8::1]:8000": 200,
    "lora.example": 200,
    "LORA.example:8443": 200,
    "other.example": 200,
    "evil.example": 421,
    "localhost.evil.example": 421,
    "127.0.0.1.evil.example": 421,
    "evil-lora.example": 421,
    "x": 421,
    "[::1": 421,
    "127.0.0.1, evil.example": 400,
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(("method", "path"), [("POST", APPLY), ("GET", "/v1/sets"), ("GET", "/x")])
def test_only_known_host_names_are_answered(site, host, method, path):
    before = snapshot(site.app.state.store)
    for _ in range(2):  # the second answer is from memory
        answer = site.request(method, path, headers={"Host": host, **JSON}, content=BODY)
        if HOSTS[host] == 421:
            assert assert_problem(answer, 421, "misdirected_request")["got"] == host
        elif HOSTS[host] == 400:
            assert assert_problem(answer, 400, "malformed_request")["got"] == host
        else:
            assert answer.status_code == (404 if path == "/x" else 200)
    assert snapshot(site.app.state.store) == before


def test_health_checks_answer_to_any_name(site):
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert site.get(path, headers={"Host": "pod-7.internal"}).status_code == 200
    assert site.get("/docs", headers={"Host": "pod-7.internal"}).status_code == 421
    oip = site.get("/v2", headers={"Host": "evil.example"})
    assert (oip.status_code, list(oip.json())) == (421, ["error"])


WRITES = [
    ("POST", APPLY, JSON, BODY),
    ("POST", "/v2/models/s/infer", JSON, INFER),
    ("POST", "/v1/sets", JSON, b'{"name": "t"}'),
    ("PUT", "/v1/sets/s/adapters/n", JSON, b'{"d_in": 2, "d_out": 2}'),
    ("DELETE", "/v1/sets/s", {}, b""),
    ("POST", "/v2/repository/models/s/unload", {}, b""),
]


@pytest.mark.parametrize(("method", "path", "headers", "body"), WRITES)
@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:1", "https://app.example.evil", ""]
)
def test_a_write_from_a_different_site_is_refused(site, method, path, headers, body, origin):
    before = snapshot(site.app.state.store)
    answer = site.request(method, path, headers={"Origin": origin, **headers}, content=body)
    assert answer.status_code == 403, answer.text
    if not path.startswith("/v2"):
        assert_problem(answer, 403, "cross_site")
    assert "access-control-allow-origin" not in answer.headers
    assert snapshot(site.app.state.store) == before


@pytest.mark.parametrize("origin", [PAGE, None], ids=["allowed", "own"])
def test_own_pages_and_allowed_ones_may_write(site, origin):
    origin = origin or str(site.base_url).rstrip("/")
    for method, path, headers, body in WRITES[:2]:
        answer = site.request(method, path, headers={"Origin": origin, **headers}, content=body)
        assert answer.status_code == 200, answer.text


def test_reading_is_left_to_the_browser(site):
    answer = site.get("/v1/sets", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_allowed_origins_get_cors(site):
    asked = {
        "Origin": PAGE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,authorization",
    }
    answer = site.options(APPLY, headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    answer = site.options(APPLY, headers={**asked, "Origin": "https://evil.example"})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    answer = site.post(APPLY, headers={"Origin": PAGE, **JSON}, content=BODY)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "ETag" in answer.headers["access-control-expose-headers"]
    assert answer.headers["vary"] == "Origin"


SIMPLE = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", ""]


@pytest.mark.parametrize("media", SIMPLE)
def test_a_page_must_ask_before_it_sends_a_body(site, media):
    own = {"Origin": str(site.base_url).rstrip("/")}
    headers = {**own, **({"Content-Type": media} if media else {})}
    assert_problem(site.post(APPLY, headers=headers, content=BODY), 415, "unsupported_media_type")
    assert site.post("/v2/models/s/infer", headers=headers, content=INFER).status_code == 400
    # Without an Origin nothing changes: curl's default, and clients that send no type.
    del headers["Origin"]
    assert site.post("/v2/models/s/infer", headers=headers, content=INFER).status_code == 200
    assert site.post(APPLY, content=BODY).status_code == 200


def test_a_trusted_proxy_says_which_host_was_called(site):
    forwarded = {"Host": "upstream", "X-Forwarded-Host": "lora.example"}
    own = {**forwarded, "Origin": "https://lora.example", **JSON}
    assert site.post(APPLY, headers=own, content=BODY).status_code == 200
    assert site.get("/v1/sets", headers=forwarded).status_code == 200
    evil = {"Host": "localhost", "X-Forwarded-Host": "evil.example"}
    assert site.get("/v1/sets", headers=evil).status_code == 421


def test_nobody_else_does(settings):
    for lane in ("auto", "off"):
        app = create_app(settings.model_copy(update={"fast_lane": lane}))
        with serving(app) as url, httpx.Client(base_url=url) as client:
            headers = {"Host": "evil.example", "X-Forwarded-Host": "localhost"}
            for method, path in (("GET", "/v1/sets"), ("POST", APPLY)):
                answer = client.request(method, path, headers=headers, content=BODY)
                assert answer.status_code == 421


def test_with_keys_any_name_is_answered_but_pages_of_others_are_not(tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add(prefixes=[""])
    headers = {"Authorization": f"Bearer {token}", "Host": "evil.example"}
    app = create_app(Settings(store=str(tmp_path / "store"), keys_file=made.path))
    with serving(app) as url, httpx.Client(base_url=url, headers=headers) as client:
        assert client.get("/v1/sets").status_code == 200
        body = {"name": "s"}
        crossing = client.post("/v1/sets", json=body, headers={"Origin": PAGE})
        assert_problem(crossing, 403, "cross_site")


def test_origins_are_origins(monkeypatch):
    for bad in ("*", "https://*.example", "app.example", "https://a.example/path"):
        with pytest.raises(ValueError, match="is not an origin"):
            Settings(cors_origins=bad)
    monkeypatch.setenv("BONSAI_LORA_CORS_ORIGINS", "https://a.example, http://b.example:81")
    assert Settings().cors_origins == ("https://a.example", "http://b.example:81")
    with pytest.raises(ValueError, match="trusted_proxies"):
        Settings(trusted_proxies="proxy.example")


def test_lists_are_given_as_words_or_with_commas(capfd, tmp_path):
    bad = ["--cors-origins", "https://a.example,https://b.example", "evil"]
    assert main(["serve", "--port", "0", "--store", str(tmp_path / "s"), *bad]) == 2
    assert "'evil' is not an origin" in capfd.readouterr().err


def test_the_name_of_a_host():
    names = {"A.example:80": "a.example", "[::1]:80": "[::1]", "[::1]": "[::1]", "": ""}
    assert {host: host_name(host.encode()) for host in names} == names

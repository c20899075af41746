"""The documentation page loads files of this service only, and they are the vendored ones."""

import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from conftest import assert_problem

from bonsai_lora.api.routes.page import FOLDER

VENDORED = json.loads((FOLDER / "vendored.json").read_text())
OWN = {"docs.html", "swagger-init.js", "vendored.json"}
LICENCES = {"Apache-2.0"}


class Tags(HTMLParser):
    """Every tag of a page with its attributes, and the text inside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inline, self._open = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, _):
        self._open = ""

    def handle_data(self, data):
        if self._open in ("script", "style"):
            self.inline += data.strip()


def test_vendored_files_are_those_of_the_manifest():
    listed = {f"{one['folder']}/{name}" for one in VENDORED for name in one["sha256"]}
    there = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert there == listed | OWN
    for one in VENDORED:
        assert re.fullmatch(r"\d+\.\d+\.\d+", one["version"])
        assert one["license"] in LICENCES
        assert "LICENSE" in one["sha256"]
        for name, expected in one["sha256"].items():
            content = (FOLDER / one["folder"] / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == expected, name


def test_the_root_redirects_to_the_page(client):
    assert client.get("/").headers["location"] == "docs"
    assert client.get("/", follow_redirects=True).url.path == "/docs"
    assert client.head("/").status_code == 307


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    tags = Tags(page.text)
    assert tags.inline == ""
    addresses = []
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        addresses += [attributes[name] for name in ("src", "href") if name in attributes]
    assert len(addresses) == 5
    for address in addresses:
        assert address == "data:," or client.get(f"/{address}").status_code == 200


def test_the_policy_allows_nothing_but_this_service(client):
    policy = client.get("/docs").headers["content-security-policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("img-src") == "'self' data:"
    assert set(rules.values()) == {"'self'", "'none'"}
    assert rules["default-src"] == "'none'"


def test_no_other_documentation_is_served(client):
    assert_problem(client.get("/redoc"), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "media_type"),
    [
        ("/docs", "text/html; charset=utf-8"),
        ("/page/swagger-init.js", "text/javascript; charset=utf-8"),
        ("/page/swagger-ui/swagger-ui.css", "text/css; charset=utf-8"),
        ("/page/swagger-ui/LICENSE", "text/plain; charset=utf-8"),
    ],
)
def test_files_are_asked_for_again_and_sent_once(client, path, media_type):
    whole = client.get(path)
    assert (whole.status_code, whole.headers["content-type"]) == (200, media_type)
    assert whole.headers["cache-control"] == "no-cache"
    assert whole.headers["x-content-type-options"] == "nosniff"
    head = client.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(whole.content)))
    same = client.get(path, headers={"If-None-Match": whole.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    assert same.headers["etag"] == whole.headers["etag"]
    assert client.get(path, headers={"If-None-Match": '"old"'}).status_code == 200


@pytest.mark.parametrize("path", ["", "nothing.js", "..%2fsettings.py", "%2fetc%2fpasswd", "."])
def test_only_files_of_the_folder_are_served(client, path):
    assert_problem(client.get(f"/page/{path}"), 404, "not_found")


def test_other_methods_are_refused(client):
    problem = assert_problem(client.post("/page/swagger-init.js"), 405, "method_not_allowed")
    assert problem["expected"] == ["GET", "HEAD"]

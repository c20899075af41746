"""The pages load files of this service only, and what others wrote is vendored."""

import hashlib
import json
import re
from html.parser import HTMLParser
from typing import get_args

import httpx
import pytest
from conftest import assert_problem, serving
from keyring import KeysFileMaker

from bonsai_lora.api.app import create_app
from bonsai_lora.api.lab_schemas import StoredDtype
from bonsai_lora.api.routes.page import FOLDER

VENDORED = json.loads((FOLDER / "vendored.json").read_text())
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.js"))
OWN = {"docs.html", "index.html", "page.css", "vendored.json", *SCRIPTS}
LICENCES = {"Apache-2.0", "MIT"}


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


@pytest.mark.parametrize(("path", "files"), [("/", 7), ("/docs", 5)])
def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(client, path, files):
    page = client.get(path)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    tags = Tags(page.text)
    assert tags.inline == ""
    addresses = []
    for _, attributes in tags.found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        addresses += [attributes[name] for name in ("src", "href") if name in attributes]
    addresses = [one for one in addresses if not one.startswith("#")]
    assert len(addresses) == files
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
        ("/", "text/html; charset=utf-8"),
        ("/page/app.js", "text/javascript; charset=utf-8"),
        ("/page/page.css", "text/css; charset=utf-8"),
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


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "swagger-init.js"])
def test_scripts_import_what_is_there_and_write_text_only(client, name):
    """Names of sets are anybody's text, so no script may write HTML or run text."""
    script = (FOLDER / name).read_text()
    for address in re.findall(r'from "([^"]+)"', script):
        assert address.startswith("./")
        assert client.get(f"/page/{address}").status_code == 200
    unsafe = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|localStorage"
    )
    assert not re.search(unsafe, script)
    assert "://" not in script


def test_the_page_is_for_everybody(settings, tmp_path):
    """A browser's navigation sends no key."""
    made = KeysFileMaker(tmp_path / "keys.json")
    made.add()
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    with serving(app) as url, httpx.Client(base_url=url) as client:
        for path in ("/", "/page/app.js", "/page/uplot/uPlot.esm.js", "/openapi.json"):
            assert client.get(path).status_code == 200
        assert_problem(client.get("/v1/sets"), 401, "unauthenticated")


def test_the_page_offers_every_type_whose_loss_is_computed():
    script = (FOLDER / "one_set.js").read_text()
    offered = json.loads(re.search(r"const dtype = select\((\[.*?\])\)", script)[1])
    assert tuple(offered) == get_args(StoredDtype)

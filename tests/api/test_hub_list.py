"""The list of repositories, a page at a time."""

import shutil
from itertools import chain

import httpx
import pytest
from conftest import TINY, serving, upload

from bonsai_lora.api.app import create_app
from bonsai_lora.api.routes import hub

SETS = [f"s{number:03}" for number in range(12)]


@pytest.fixture
def listed(settings, tmp_path, monkeypatch):
    """A client of a service with one base, and pages of five repositories."""
    monkeypatch.setattr(hub, "PAGE", 5)
    shutil.copytree(TINY / "base", tmp_path / "bases" / "base")
    changes = {
        "bases": str(tmp_path / "bases"),
        "root_path": "/lora",
        "trusted_proxies": ("127.0.0.0/8",),
    }
    app = create_app(settings.model_copy(update=changes))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        client.app = app
        for name in SETS:
            client.post("/v1/sets", json={"name": name})
        upload(client, "plain", TINY / "plain")
        yield client


def pages(client, **query):
    """The ids of each page, following the links."""
    answer = client.get("/api/models", params=query)
    while True:
        yield [one["id"] for one in answer.json()]
        if "next" not in answer.links:
            return
        address = answer.links["next"]["url"]
        assert address.startswith(f"{str(client.base_url).rstrip('/')}/lora/api/models?")
        answer = client.get(address.replace("/lora", ""))  # as a proxy does


def test_all_pages_together_are_all_repositories(listed):
    found = list(pages(listed))
    adapters = sorted(f"adapters/{name}" for name in [*SETS, "plain"])
    # Sets without modules cannot be merged, so that whole pages have nothing.
    assert list(chain(*found)) == [*adapters, "bases/base", "base/plain"]
    assert (max(map(len, found)), [] in found) == (5, True)


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_an_author_a_search_and_a_limit(listed, limit):
    found = list(pages(listed, author="adapters", search="S00", limit=limit))
    assert list(chain(*found)) == [f"adapters/s00{number}" for number in range(10)]
    assert max(map(len, found)) == min(limit, 5)
    assert list(pages(listed, author="nobody")) == [[]]
    assert list(pages(listed, cursor="nobody/x")) == [[]]
    assert list(pages(listed, author="adapters", cursor="adapters/s010")) == [["adapters/s011"]]


def test_a_page_opens_no_more_sets_than_it_has(listed):
    store = listed.app.state.store
    for name in [*SETS, "plain"]:
        store.forget(name)
    listed.get("/api/models")
    assert len(store.open_sets()) == 5


def test_the_link_is_that_of_the_proxy(listed):
    headers = {"X-Forwarded-Host": "localhost:8443", "X-Forwarded-Proto": "https"}
    answer = listed.get("/api/models", headers=headers)
    assert answer.links["next"]["url"].startswith("https://localhost:8443/lora/api/models?")

"""The documentation page in a real browser: Debian's `chromium` package, or $CHROMIUM."""

import json
import os
import re
import shutil
import subprocess

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--enable-logging=stderr", "--virtual-time-budget=20000"),
]

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"
    ),
]


def browse(url, folder):
    """The page at `url` after its scripts have run, its console lines, and its requests."""
    requests = folder / "requests.json"
    own = [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={requests}"]
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, *own, "--dump-dom", url], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    console = re.findall(r'CONSOLE.*?\] "(.*?)", source', done.stderr, re.DOTALL)
    events = json.loads(requests.read_text())["events"]
    asked = {
        event["params"]["url"]
        for event in events
        if event.get("params", {}).get("initiator", "not an origin") != "not an origin"
        and "url" in event["params"]
    }
    return done.stdout, console, asked


def test_the_page_shows_every_operation(client, tmp_path):
    url = str(client.base_url)
    paths = client.get("/openapi.json").json()["paths"]
    operations = [path for path, item in paths.items() for _ in item]
    dom, console, asked = browse(f"{url}/docs", tmp_path)
    shown = re.findall(r'data-path="([^"]+)"', dom)
    assert sorted(shown) == sorted(operations)
    assert console == []
    files = ("swagger-init.js", "swagger-ui/swagger-ui-bundle.js", "swagger-ui/swagger-ui.css")
    assert asked == {f"{url}/openapi.json", *(f"{url}/page/{name}" for name in files)}


def test_an_open_operation_violates_no_policy(client, tmp_path):
    dom, console, _ = browse(f"{client.base_url}/docs#/apply/apply_adapter", tmp_path)
    assert "Try it out" in dom
    assert "shape_mismatch" in dom
    # Swagger UI itself warns about underscores in its own deep links.
    assert [line for line in console if not line.startswith("Deprecated: escaping deep link")] == []

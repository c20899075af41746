"""The page in a real browser: every flow, by mouse and keyboard, without another host."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import numpy as np
import pytest
from browsing import CHROMIUM, visiting
from conftest import (
    TINY,
    peft_config,
    read_tensors,
    serving,
    upload,
)
from keyring import KeysFileMaker, caller

import bonsai_lora
from bonsai_lora.api.app import create_app

pytestmark = [
    pytest.mark.page,
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium on the PATH: apt-get install chromium"
    ),
    pytest.mark.skipif(find_spec("playwright") is None, reason="run make test-page"),
]

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser, service):
    with visiting(browser, service) as one:
        yield one


@pytest.fixture
def sets(service):
    """A client of the service, which has three sets."""
    with httpx.Client(base_url=service, timeout=30) as client:
        for name in ("plain", "rslora-patterns", "dora"):
            assert upload(client, name, TINY / name).status_code == 201
        yield client


def wait_until(check, seconds=15):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_table_is_paged_and_filtered(visit, based):
    for number in range(120):
        body = {"name": f"s{number:03}", "config": {"rank": 1 + number % 7}}
        assert based.post("/v1/sets", json=body).status_code == 201
    evil = "<img src=x onerror=alert(1)>"
    based.post("/v1/sets", json={"name": "a-first", "base_model_name": evil})
    page = visit.open()
    names = lambda: visit.text("table.sets tbody th")  # noqa: E731
    assert names() == ["a-first", *[f"s{number:03}" for number in range(49)]]
    assert page.locator("table.sets tr").nth(1).locator("td").nth(1).inner_text() == evil
    assert page.locator("img").count() == 0
    page.get_by_role("link", name="Next page").click()
    wait_until(lambda: names()[:1] == ["s049"])
    page.get_by_role("link", name="Next page").click()
    wait_until(lambda: len(names()) == 21)
    assert page.get_by_role("link", name="Next page").count() == 0
    page.get_by_role("link", name="Previous page").click()
    wait_until(lambda: names()[:1] == ["s049"])
    page.get_by_label("Name begins with").fill("s01")
    page.get_by_role("button", name="Filter").click()
    wait_until(lambda: len(names()) == 10)
    assert names() == [f"s01{number}" for number in range(10)]
    page.get_by_label("Name begins with").fill("")
    page.get_by_label("Base model is").fill(evil)
    page.keyboard.press("Enter")
    wait_until(lambda: len(names()) == 1)
    assert names() == ["a-first"]
    page.get_by_label("Name begins with").fill("nothing")
    page.keyboard.press("Enter")
    page.get_by_text("No set matches the filter.").wait_for()


def drop(page, path):
    """Drop a file or folder of this machine onto the page, as the window system does."""
    page.locator(".drop").scroll_into_view_if_needed()
    box = page.locator(".drop").bounding_box()
    place = {"x": box["x"] + 20, "y": box["y"] + 20}
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    session = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})


def test_a_folder_is_uploaded_by_drop(visit, based, tmp_path):
    page = visit.open()
    assert page.get_by_role("button", name="Upload").is_disabled()
    drop(page, TINY / "plain")
    page.get_by_text("Chosen: adapter_config.json").wait_for()
    assert page.get_by_label("Name of the set").input_value() == "plain"
    page.get_by_role("button", name="Upload").click()
    page.get_by_text("Uploaded plain, version 1").wait_for()
    report = based.get("/v1/sets/plain").json()
    assert visit.text(".report tbody th") == [one["name"] for one in report["modules"]]
    page.get_by_role("link", name="plain", exact=True).first.wait_for()
    assert visit.text("table.sets tbody th") == ["plain"]
    page.get_by_role("button", name="Upload").click()
    dialog = page.get_by_role("dialog", name="plain exists in version 1. Replace it?")
    dialog.get_by_role("button", name="Cancel").click()
    assert based.get("/v1/sets/plain").json()["version"] == 1
    page.get_by_role("button", name="Upload").click()
    dialog.get_by_role("button", name="Replace").click()
    page.get_by_text("Uploaded plain, version 2").wait_for()
    assert based.get("/v1/sets/plain").json()["version"] == 2
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    drop(page, tmp_path / "half")
    page.get_by_text("adapter_model is missing; drop a folder").wait_for()


def test_files_are_chosen_and_refusals_shown(visit, based, tmp_path, rng):
    page = visit.open()
    assert upload(based, "plain", TINY / "plain").status_code == 201
    gguf = tmp_path / "mine.gguf"
    gguf.write_bytes(based.get("/v1/sets/plain/adapter.gguf").content)
    page.get_by_label("or files").set_input_files(str(gguf))
    assert page.get_by_label("Name of the set").input_value() == "mine"
    page.get_by_label("Name of the set").fill("from-gguf")
    page.get_by_role("button", name="Upload").click()
    page.get_by_text("Uploaded from-gguf, version 1").wait_for()
    assert based.get("/v1/sets/from-gguf").json()["origin"] == "gguf"
    page.get_by_label("a folder", exact=True).set_input_files(str(TINY / "dora"))
    page.get_by_label("Name of the set").fill("a-folder")
    page.get_by_role("button", name="Upload").click()
    page.get_by_text("Uploaded a-folder, version 1").wait_for()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_text(json.dumps(peft_config(r=9)))
    (bad / "adapter_model.safetensors").write_bytes(
        (TINY / "plain" / "adapter_model.safetensors").read_bytes()
    )
    visit.refused = {422}
    page.get_by_label("a folder", exact=True).set_input_files(str(bad))
    page.get_by_label("Name of the set").fill("bad")
    page.get_by_role("button", name="Upload").click()
    shown = page.locator(".failure").inner_text()
    assert "(request " in shown
    assert based.get("/v1/sets/bad").status_code == 404


def test_a_set_is_deleted_after_a_question(visit, sets):
    page = visit.open()
    page.get_by_role("button", name="Delete dora").click()
    dialog = page.get_by_role("dialog")
    assert "Delete dora, version 1 with 14 modules?" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert sets.get("/v1/sets/dora").status_code == 200
    page.get_by_role("button", name="Delete dora").click()
    dialog.get_by_role("button", name="Delete").click()
    page.get_by_role("link", name="dora").wait_for(state="detached")
    page.get_by_role("link", name="plain", exact=True).wait_for()
    assert sets.get("/v1/sets/dora").status_code == 404


def test_one_set(visit, sets, service):
    visit.open()
    visit.picture("sets")
    page = visit.open("#/sets/plain")
    stats = sets.get("/v1/sets/plain/stats").json()["modules"]
    page.locator(".chart canvas").wait_for()
    titles = page.locator(".heat").evaluate_all("cells => cells.map(cell => cell.title)")
    expected = {
        f"{one['name'].split('.')[2]}, {one['name'].split('.', 3)[3]}: {one['delta_norm']}"
        for one in stats
    }
    shown = {(place, float(number)) for place, number in (one.split(": ") for one in titles)}
    assert shown == {(one.split(": ")[0], float(one.split(": ")[1])) for one in expected}
    page.get_by_label("Show").select_option("Effective rank")
    page.get_by_text("Effective rank by layer").wait_for()
    spectra = page.get_by_role("region", name="Spectra").locator("tbody th")
    assert spectra.count() == 1
    page.locator(".heat").first.click()
    wait_until(lambda: spectra.count() == 2)
    page.get_by_label("Module").first.select_option(Q_PROJ)
    page.get_by_role("button", name="Add").click()
    page.get_by_role("region", name="Spectra").get_by_text(Q_PROJ).wait_for()
    page.get_by_role("button", name="Show the files").click()
    page.get_by_text("The set merges into tiny-qwen3.").wait_for()
    page.get_by_role("button", name="Estimate what survives").click()
    page.get_by_text("Stored as BF16:").wait_for()
    visit.picture("one-set")


def test_vectors_are_applied(visit, sets):
    page = visit.open("#/sets/plain")
    page.get_by_label("Module").last.select_option(Q_PROJ)
    page.get_by_role("button", name="unit vector").click()
    vectors = json.loads(page.get_by_label("Vectors, as a list of lists").input_value())
    page.get_by_role("button", name="Apply").click()
    table = page.get_by_role("region", name=f"Outputs of {Q_PROJ}, version 1")
    table.wait_for()
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    config = json.loads((TINY / "plain" / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{Q_PROJ}.lora_{part}.weight"] for part in "AB")
    expected = config["lora_alpha"] / config["r"] * np.asarray(vectors) @ a.T @ b.T
    found = [float(one) for one in table.locator("td").nth(1).inner_text().split(" … ")[0].split()]
    assert np.allclose(found, expected[0][: len(found)], rtol=6e-3, atol=1e-6)
    page.get_by_label("Vectors, as a list of lists").fill("[[1, 2")
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("The vectors are not JSON").wait_for()
    visit.refused = {422}
    page.get_by_label("Vectors, as a list of lists").fill("[[1, 2]]")
    page.get_by_role("button", name="Apply").click()
    page.locator(".failure", has_text="(request ").wait_for()


def test_files_are_downloaded(visit, sets, tmp_path):
    page = visit.open("#/sets/plain")
    for button, path in (
        ("adapter_config.json", "/v1/sets/plain/adapter_config.json"),
        ("adapter_model.safetensors", "/v1/sets/plain/adapter_model.safetensors"),
        ("GGUF for llama.cpp", "/v1/sets/plain/adapter.gguf"),
    ):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=button, exact=True).click()
        waiting.value.save_as(tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == sets.get(path).content


def snippets_of(page):
    """The commands and programs of a view by their titles."""
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    titles = [one.split("\n")[0] for one in page.locator(".snippet > p").all_inner_texts()]
    titles = [one.removesuffix("Copy").strip() for one in titles]
    texts = page.locator(".snippet > pre").all_inner_texts()
    return dict(zip(titles, texts, strict=True))


def test_commands_and_programs_run(visit, sets, tmp_path):
    page = visit.open("#/sets/plain")
    page.get_by_role("button", name="Show the files").click()
    page.get_by_text("The set merges into tiny-qwen3.").wait_for()
    found = snippets_of(page)
    page.get_by_role("button", name="Copy curl: Download plain").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == found["curl: Download plain"]
    found |= snippets_of(visit.open("#/sets"))
    page = visit.open("#/compare?set=plain&set=rslora-patterns")
    page.get_by_label("Name of the new set").fill("both")
    page.get_by_role("button", name="Dry run").click()
    page.get_by_text("Dry run: nothing is stored.").wait_for()
    found |= snippets_of(page)
    found |= snippets_of(visit.open("#/service"))
    for kind in ("curl: ", "Python: "):
        assert len([title for title in found if title.startswith(kind)]) == 11
    source = str(Path(bonsai_lora.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for folder in (tmp_path, tmp_path / "folder"):
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes((TINY / "plain" / name).read_bytes())
    # What deletes or creates runs once for each kind.
    for title, text in sorted(found.items(), key=lambda one: "Delete" in one[0]):
        if title == "Python: Combine":
            assert sets.delete("/v1/sets/both").status_code == 204
        if title == "Python: Delete plain":
            assert upload(sets, "plain", TINY / "plain").status_code == 201
        is_curl = title.startswith("curl: ")
        command = ["sh", "-c", text] if is_curl else [sys.executable, "-c", text]
        if "[[…]]" in text:
            continue
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, (title, text, done.stderr)
    assert [one["name"] for one in sets.get("/v1/sets").json()["sets"]] == [
        *("NAME", "both", "dora", "rslora-patterns")
    ]


def test_sets_are_compared_and_combined(visit, sets):
    page = visit.open()
    page.get_by_label("Mark plain").check()
    assert page.get_by_role("link", name="Compare 1 marked").count() == 0
    page.get_by_label("Mark rslora-patterns").check()
    page.get_by_role("link", name="Compare 2 marked").click()
    page.get_by_role("region", name="Cosine of the deltas").wait_for()
    known = sets.get("/v1/compare", params={"set": ["plain", "rslora-patterns"]}).json()
    shown = page.locator(".heat").evaluate_all("cells => cells.map(cell => cell.title)")
    numbers = [float(one.split(": ")[1]) for one in shown]
    assert numbers == [number for line in known["cosine"] for number in line]
    page.get_by_label("Name of the new set").fill("both")
    page.get_by_label("Method").select_option("svd")
    page.get_by_label("rank", exact=True).fill("3")
    page.get_by_label("plain", exact=True).fill("0.5")
    page.get_by_role("button", name="Dry run").click()
    page.get_by_text("Dry run: nothing is stored.").wait_for()
    assert "Method svd: rank up to 3" in page.locator(".report").inner_text()
    assert sets.get("/v1/sets/both").status_code == 404
    visit.picture("compare")
    page.get_by_role("button", name="Combine").click()
    page.get_by_role("link", name="both").click()
    page.get_by_role("heading", name="both", level=1).wait_for()
    assert sets.get("/v1/sets/both").json()["origin"] == "combined"


def test_the_service_is_shown_live(visit, sets):
    visit.open("#/service")
    page = visit.page
    sets.get("/v1/sets/nothing")
    page.get_by_role("region", name="Errors by code").get_by_text("set_not_found").wait_for()
    region = page.get_by_role("region", name="Requests of the last two seconds")
    region.wait_for()
    end = time.monotonic() + 20
    while "/v1/sets/{set}/adapters/{module}/apply" not in region.inner_text():
        assert time.monotonic() < end
        for _ in range(20):
            sets.post(
                f"/v1/sets/plain/adapters/{Q_PROJ}/apply", json={"inputs": [[1.0] * 64]}
            ).raise_for_status()
        page.wait_for_timeout(100)
    line = region.locator("tr", has_text="/apply").locator("td").all_inner_texts()
    assert float(line[0]) > 0
    assert line[1].endswith(("µs", "ms"))
    lanes = page.get_by_role("region", name="Lanes").locator("tbody th").all_inner_texts()
    assert lanes == ["jobs", "long", "short"]
    assert page.locator(".facts meter").count() == 1
    combination = {"name": "both", "sets": [{"set": "plain"}, {"set": "rslora-patterns"}]}
    later = {"Prefer": "respond-async"}
    job = sets.post("/v1/combine", json=combination, headers=later).raise_for_status().json()
    row = page.get_by_role("region", name="Jobs").locator("tr", has_text=job["id"])
    row.get_by_text("done", exact=True).wait_for()
    visit.picture("service")
    page.get_by_role("link", name="Sets").click()
    page.get_by_role("heading", name="Sets").wait_for()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)
    assert asked == []


def test_a_key_is_asked_for_and_stays_in_the_tab(browser, settings, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add(scopes=["read", "write"])
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    with serving(app) as url, caller(url, token) as client:
        upload(client, "acme.one", TINY / "plain")
        expected = client.get("/v1/sets/acme.one/adapter_model.safetensors").content
        with visiting(browser, url) as visit:
            visit.refused = {401, 403}
            page = visit.open()
            dialog = page.get_by_role("dialog", name="Key")
            dialog.get_by_label("Key").fill(token)
            page.keyboard.press("Enter")
            page.get_by_role("link", name="acme.one").click()
            page.get_by_role("heading", name="acme.one", level=1).wait_for()
            with page.expect_download() as waiting:
                page.get_by_role("button", name="adapter_model.safetensors").click()
            assert Path(waiting.value.path()).read_bytes() == expected
            kept = page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]")
            assert kept == [0, "", 1]
            assert "$BONSAI_LORA_TOKEN" in snippets_of(page)["curl: Download acme.one"]
            assert token not in page.content()
            visit.open("#/service")
            page.get_by_text("need a key with the scope admin").wait_for()
            page.get_by_role("button", name="Key ✓").click()
            dialog.get_by_role("button", name="Forget the key").click()
            dialog.get_by_label("Key").wait_for()
            assert page.evaluate("sessionStorage.length") == 0


def test_everything_is_reached_by_keyboard(visit, sets):
    page = visit.open()
    focus = lambda: page.evaluate(  # noqa: E731
        "(document.activeElement.getAttribute('aria-label') ?? document.activeElement.textContent).trim()"
    )
    page.keyboard.press("Tab")
    assert focus() == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(focus())
        if reached[-1] == "plain":
            break
    assert "Filter" in reached
    assert "Mark plain" in reached
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="plain", level=1).wait_for()
    assert page.evaluate("document.activeElement.id") == "main"
    assert page.title() == "plain · Bonsai LoRA"
    everything = page.evaluate(
        "[...document.querySelectorAll('button, a, input, select, textarea, summary')]"
        ".filter(one => one.tabIndex < 0).length"
    )
    assert everything == 0


VIEWS = ("#/sets", "#/sets/plain", "#/compare?set=plain&set=dora", "#/service")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser, service, sets, scheme):
    from axe_playwright_python.sync_playwright import Axe

    with visiting(browser, service, color_scheme=scheme) as visit:
        for view in VIEWS:
            page = visit.open(view)
            page.wait_for_timeout(2500 if view == "#/service" else 500)
            found = Axe().run(page).response["violations"]
            told = [
                (one["id"], [node["failureSummary"] for node in one["nodes"][:3]]) for one in found
            ]
            assert told == [], view
            if scheme == "dark" and view == "#/sets/plain":
                visit.picture("one-set-dark")


def test_a_phone_shows_everything(browser, service, sets):
    options = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2}
    with visiting(browser, service, **options) as visit:
        visit.page.set_viewport_size({"width": 390, "height": 844})
        for view in VIEWS:
            page = visit.open(view)
            page.wait_for_timeout(500)
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390, view
            if view == "#/sets":
                visit.picture("sets-phone")


def test_an_unknown_set_says_so(visit, based):
    visit.refused = {404}
    page = visit.open("#/sets/nothing")
    page.get_by_role("heading", name="Something went wrong").wait_for()
    assert "nothing" in page.locator(".failure").inner_text()

"""What is written down is true: settings, error codes, the OpenAPI document and its examples."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import serving

from bonsai_lora import errors
from bonsai_lora.api.app import create_app
from bonsai_lora.api.errors import status_of
from bonsai_lora.cli.openapi import render
from bonsai_lora.settings import Settings

ROOT = Path(__file__).parent.parent
SETTINGS = (ROOT / "docs" / "settings.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
OPENAPI = json.loads((ROOT / "openapi" / "openapi.json").read_text())
EXAMPLES = sorted((ROOT / "openapi" / "examples").glob("*.json"))


def all_errors(kind=errors.BonsaiLoraError):
    for child in kind.__subclasses__():
        yield child
        yield from all_errors(child)


@pytest.mark.parametrize("name", list(Settings.model_fields))
def test_every_setting_is_documented(name):
    row = f"| `BONSAI_LORA_{name.upper()}` | `--{name.replace('_', '-')}` | "
    assert SETTINGS.count(row) == 1


def test_every_documented_setting_exists():
    names = re.findall(r"^\| `BONSAI_LORA_(\w+)`", SETTINGS, re.MULTILINE)
    assert sorted(map(str.lower, names)) == sorted(Settings.model_fields)


@pytest.mark.parametrize("kind", list(all_errors()), ids=lambda kind: kind.__name__)
def test_every_error_is_documented_with_its_status(kind):
    leaf = not kind.__subclasses__() or kind.code == "not_found"
    if leaf:
        assert ERRORS.count(f"| {status_of(kind).value} | `{kind.code}` | ") == 1


def test_every_documented_code_exists():
    codes = re.findall(r"^\| \d{3} \| `(\w+)`", ERRORS, re.MULTILINE)
    assert set(codes) <= {kind.code for kind in all_errors()}


def test_error_codes_are_unique():
    same = (errors.RouteNotFoundError, errors.TooManyFilesError)
    codes = [kind.code for kind in all_errors() if not issubclass(kind, same)]
    assert len(codes) == len(set(codes))


def test_the_document_is_what_the_code_says():
    assert (ROOT / "openapi" / "openapi.json").read_text() == render(), "run make openapi"


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]


def anchors_of(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one).lower().replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert link.startswith("https://") or target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def operations():
    for path, item in OPENAPI["paths"].items():
        for method, operation in item.items():
            yield f"{method} {path}", operation


@pytest.mark.parametrize(("place", "operation"), list(operations()))
def test_every_operation_is_described(place, operation):
    assert operation["operationId"]
    assert operation["summary"]
    assert operation["tags"]
    assert "422" not in operation["responses"] or (
        "application/problem+json" in operation["responses"]["422"]["content"]
    )


def test_operation_ids_are_unique_and_named_in_an_example():
    ids = [operation["operationId"] for _, operation in operations()]
    assert len(ids) == len(set(ids))
    shown = {json.loads(path.read_text())["operation"] for path in EXAMPLES}
    assert shown <= set(ids)
    assert {"create_set", "apply_adapter", "apply_many", "put_adapter", "merge_weights"} <= shown


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_do_what_they_say(path, settings):
    example = json.loads(path.read_text())
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        for step in [*example.get("before", []), example]:
            answer = client.request(step["method"], step["path"], json=step.get("body"))
            assert answer.status_code == step["status"], answer.text
        expected = example.get("answer", {})
        assert {key: answer.json()[key] for key in expected} == expected


def test_a_generated_client_builds_without_a_warning_and_works(tmp_path, settings):
    target = tmp_path / "generated"
    command = [
        *[sys.executable, "-m", "openapi_python_client", "generate", "--output-path", str(target)],
        *["--path", str(ROOT / "openapi" / "openapi.json")],
        *["--config", str(ROOT / "openapi" / "client.yaml"), "--fail-on-warning"],
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout.lower()
    with serving(create_app(settings)) as url:
        used = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "generated_client.py"), str(target), url],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert used.returncode == 0, used.stdout + used.stderr

"""`--sets DIR`: the service is ready when its adapters are."""

import shutil
import subprocess

import httpx
from conftest import TINY
from test_command import COMMAND, running


def test_adapters_are_there_when_the_service_answers(tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(TINY / "plain", folder / "plain")
    (folder / "empty").mkdir()
    flags = ("--store", str(tmp_path / "store"), "--sets", str(folder), "--workers", "2")
    with running(*flags) as (url, _):
        assert httpx.get(f"{url}/v1/sets/plain").json()["version"] == 1
        assert len(httpx.get(f"{url}/v1/sets").json()["sets"]) == 1


def test_the_store_is_no_folder_of_adapters(tmp_path):
    for flags in (
        ("--store", str(tmp_path), "--sets", str(tmp_path / "sets")),
        ("--store", str(tmp_path / "store"), "--sets", str(tmp_path / "nothing")),
    ):
        done = subprocess.run(
            [COMMAND, "serve", "--port", "0", *flags], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 2
        assert "cannot be imported" in done.stderr

"""`--sets DIR`: the service is ready when its adapters are."""

import shutil
import subprocess
import time

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


def test_the_folder_of_a_single_adapter_is_named(tmp_path):
    log = tmp_path / "log"
    with log.open("w") as stderr:
        command = [COMMAND, "serve", "--port", "0", "--store", str(tmp_path / "store")]
        command += ["--kernels", "off"]
        with subprocess.Popen([*command, "--sets", str(TINY / "plain")], stderr=stderr) as process:
            deadline = time.monotonic() + 20
            while "ready" not in log.read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.terminate()
    assert "plain is itself an adapter; give --sets the folder around it" in log.read_text()

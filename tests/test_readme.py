"""The README's commands give the README's output."""

import os
import re
import subprocess
from pathlib import Path

import httpx
import pytest
from conftest import TINY, serving, upload

from bonsai_lora.api.app import create_app

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(BLOCKS), re.MULTILINE)


def normal(text):
    # The last digit of a float32 sum depends on the processor.
    text = re.sub(r" *(-?\d+\.\d{7,})", lambda found: f" {float(found[1]):.6f}", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", text)
    return re.sub(r'"request_id":"\w+"', '"request_id":"ID"', text).strip()


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.filterwarnings("default")
def test_every_command_gives_its_output(app):
    with serving(app) as url:
        for command, expected in COMMANDS:
            real = command.replace("localhost:8000", url.removeprefix("http://"))
            done = subprocess.run(
                ["bash", "-c", real], capture_output=True, text=True, timeout=30, cwd=ROOT
            )
            assert done.returncode == 0, done.stderr
            assert normal(done.stdout) == normal(expected), command


def test_the_python_of_the_protocols_page_runs(settings):
    text = (ROOT / "docs" / "open-inference-protocol.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    key = f"/bonsai-test-{os.getpid()}"
    with (
        serving(create_app(settings.model_copy(update={"shared_memory": True}))) as url,
        httpx.Client(base_url=url) as client,
    ):
        upload(client, "plain", TINY / "plain")
        names = {}
        real = code.replace("localhost:8000", url.removeprefix("http://")).replace("/vectors", key)
        exec(real, names)
        assert names["delta"].shape == names["mixed"].shape == (3, 128)
        assert not names["mixed"][1].any()
        names["server"].close()

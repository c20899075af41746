"""The README's commands give the README's output."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import serving

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(BLOCKS), re.MULTILINE)


def normal(text):
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

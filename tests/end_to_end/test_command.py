"""The command that serves, as a process: flags, variables, signals, restart."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from bonsai_lora.cli import serve
from bonsai_lora.cli.main import main
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")


@contextlib.contextmanager
def running(*flags, port="0", command=(COMMAND,), **variables):
    """Run `bonsai-lora serve` on a free port; yield the address from its log and its process.

    It computes in NumPy, which starts half a second sooner, unless `variables` say otherwise.
    """
    process = subprocess.Popen(
        [*command, "serve", *([] if port is None else ["--port", port]), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BONSAI_LORA_KERNELS": "off", **variables},
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on (.+), sets in", line):
                break
        else:
            pytest.fail("it did not start:\n" + "".join(lines))
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        yield found[1], process
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        finally:
            process.kill()
            process.wait(timeout=20)
            drain.join(timeout=40)  # workers may finish requests for 30 seconds
        assert not drain.is_alive(), "a process of the service is still there"
        process.stderr.close()


def workers_of(process):
    """The process ids of the workers of a service."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def test_sigterm_finishes_requests_in_flight_and_exits_0(tmp_path):
    with running("--store", str(tmp_path)) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"})
        httpx.put(f"{url}/v1/sets/s/adapters/m", json={"d_in": 2, "d_out": 2})
        sent = threading.Event()

        def body():
            yield b'{"inputs":'
            sent.set()
            time.sleep(0.7)
            yield b"[1,2]}"

        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(
                    f"{url}/v1/sets/s/adapters/m/apply",
                    content=body(),
                    headers={"Content-Type": "application/json"},
                )
            )
        )
        thread.start()
        sent.wait(10)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0].json()["outputs"] == [0.0, 0.0]
        assert process.wait(timeout=20) == 0


def test_variables_that_are_not_settings_are_named(monkeypatch):
    for name in ("BONSAI_LORA_PROT", "BONSAI_LORA_PORT", "BONSAI_LORA_URL", "BONSAI_LORA_TOKEN"):
        monkeypatch.setenv(name, "8000")
    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    log = logging.getLogger("bonsai_lora")
    log.addHandler(handler)
    try:
        serve._warn_of_unknown_variables()
    finally:
        log.removeHandler(handler)
    named = " ".join(warnings)
    assert "BONSAI_LORA_PROT is not a setting" in named
    for known in ("BONSAI_LORA_PORT", "BONSAI_LORA_URL", "BONSAI_LORA_TOKEN"):
        assert known not in named


def test_a_restart_keeps_everything(tmp_path):
    with running(BONSAI_LORA_STORE=str(tmp_path)) as (url, process):
        created = httpx.post(f"{url}/v1/sets", json={"name": "s", "model": "qwen3-0.6b"})
        assert created.status_code == 201
        process.kill()
    with running(BONSAI_LORA_STORE=str(tmp_path)) as (url, _):
        again = httpx.get(f"{url}/v1/sets/s")
        assert again.headers["etag"] == created.headers["etag"]
        assert again.json() == created.json()


def test_flags_take_precedence_and_memory_stores_are_deleted(tmp_path):
    with running("--store", "memory:", BONSAI_LORA_STORE=str(tmp_path / "x")) as (url, process):
        assert httpx.post(f"{url}/v1/sets", json={"name": "s"}).status_code == 201
        assert not (tmp_path / "x").exists()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--port", "x"], "port"),
        (["--port", "70000"], "port"),
        (["--max-rows", "0"], "max_rows"),
        (["--log-format", "xml"], "log_format"),
        (["--store", "/proc/nothing", "--port", "0"], "store"),
        (["--store", "s3:bucket/sets", "--port", "0"], "s3:bucket/sets"),
        (["--store", "", "--port", "0"], "store"),  # would be the working folder
        (["--kernels", "fast"], "kernels"),
    ],
)
def test_wrong_settings_are_named(flags, word, capsys):
    assert main(["serve", *flags]) == 2
    assert word in capsys.readouterr().err.replace("-", "_")


def test_an_empty_variable_counts_as_not_set(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.setenv(f"BONSAI_LORA_{name.upper()}", "")
    empty = Settings()
    for name in Settings.model_fields:
        monkeypatch.delenv(f"BONSAI_LORA_{name.upper()}")
    assert empty == Settings()


@pytest.mark.parametrize(
    ("bases", "text"),
    [
        ("absent", "does not exist; check --bases"),
        ("file", "is not a folder; check --bases"),
        ("one", "is itself a model; give --bases the folder around it"),
    ],
)
def test_a_folder_that_has_no_bases_is_logged(tmp_path, bases, text):
    (tmp_path / "file").touch()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "model.safetensors").touch()
    # A store that cannot be opened ends the command right after the checks of the settings.
    flags = ["--bases", str(tmp_path / bases), "--store", "/proc/nothing", "--port", "0"]
    done = subprocess.run([COMMAND, "serve", *flags], stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert f"the folder of bases {tmp_path / bases} {text}" in done.stderr


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    assert done.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert field.description[:40] in text


def test_json_logs_carry_the_request_id(tmp_path):
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", "0", "--store", "memory:", "--log-format", "json"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "BONSAI_LORA_KERNELS": "off"},
    )
    lines = []
    with process:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving on (http://[\d.:]+)", line):
                break
        httpx.get(f"{found[1]}/v1/sets/none", headers={"X-Request-Id": "look-for-me"})
        process.send_signal(signal.SIGTERM)
        lines += process.stderr.readlines()
    entries = [json.loads(line) for line in lines]
    assert any(
        one.get("request_id") == "look-for-me" and one["code"] == "set_not_found" for one in entries
    )


def test_shared_memory_is_a_switch_for_the_loopback_only(tmp_path, capsys):
    flags = ["serve", "--port", "0", "--store", str(tmp_path), "--host", "0.0.0.0"]
    assert main([*flags, "--shared-memory"]) == 2
    assert "--shared-memory" in (said := capsys.readouterr().err)
    assert "loopback" in said
    for given in ((), ("true",)):
        with running("--store", str(tmp_path), "--shared-memory", *given) as (url, _):
            assert "system_shared_memory" in httpx.get(f"{url}/v2").json()["extensions"]
    with running("--store", str(tmp_path), BONSAI_LORA_SHARED_MEMORY="1") as (url, _):
        assert httpx.get(f"{url}/v2/systemsharedmemory/status").json() == []


def test_sigterm_in_the_middle_of_a_long_body(tmp_path):
    """The request is completed, and the connection accepts no other."""
    with running("--store", str(tmp_path)) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"})
        httpx.put(f"{url}/v1/sets/s/adapters/m", json={"d_in": 256, "d_out": 2})
        body = safetensors.encode({"inputs": np.zeros((2000, 256), np.float32)})
        head = (
            f"POST /v1/sets/s/adapters/m/apply HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
            "\r\nContent-Type: application/vnd.safetensors\r\n\r\n"
        )
        host, _, port = url.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(head.encode() + body[:1_000_000])
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            connection.sendall(body[1_000_000:])
            answer = b""
            while part := connection.recv(1 << 16):
                answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.partition(b"\r\n\r\n")[0].lower()
        assert process.wait(timeout=10) == 0


def test_it_serves_without_linux_system_calls(tmp_path):
    """As on macOS: no affinity, no mincore, mallopt or prctl, and no limit on files to raise."""
    code = (
        "import ctypes, os, resource, sys\n"
        "class Library(ctypes.CDLL):\n"
        "    def __getattr__(self, name):\n"
        "        if name in ('mincore', 'mallopt', 'prctl'):\n"
        "            raise AttributeError(name)\n"
        "        return super().__getattr__(name)\n"
        "def refuse(*_):\n"
        "    raise ValueError('current limit exceeds maximum limit')\n"
        "from bonsai_lora.cli import main, serve\n"
        "ctypes.CDLL, resource.setrlimit = Library, refuse\n"
        "del os.sched_getaffinity\n"
        "os.process_cpu_count = os.cpu_count\n"  # from Python 3.13, it needs the affinity
        "sys.exit(main.main())\n"
    )
    command = [sys.executable, "-c", code]
    with running("--store", str(tmp_path), command=command) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"}).raise_for_status()
        httpx.put(f"{url}/v1/sets/s/adapters/m", json={"d_in": 2, "d_out": 2}).raise_for_status()
        answer = httpx.post(f"{url}/v1/sets/s/adapters/m/apply", json={"inputs": [1, 2]})
        assert answer.json()["outputs"] == [0.0, 0.0]
        size = (tmp_path / "sets" / "s.safetensors").stat().st_size
        assert httpx.get(f"{url}/v1/stats").json()["resident_bytes"] >= size
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0

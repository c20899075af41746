"""Lines of the log: their fields, trace ids, and texts that try to forge a line."""

import asyncio
import io
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
import structlog
from conftest import TINY, connect, read_answer, serving, upload
from test_command import workers_of

from bonsai_lora.api.app import create_app
from bonsai_lora.api.metrics import Metrics
from bonsai_lora.api.middleware import Observer, trace_id_of
from bonsai_lora.cli.logs import configure_logging
from bonsai_lora.errors import BusyError, SetNotFoundError

COMMAND = str(Path(sys.executable).parent / "bonsai-lora")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
HOSTILE = "x\r\n2026-01-01T00:00:00Z [info] forged \x1b[2J\x07\x00\x7f\x85\u2028\u202e\ud800 y"
APPLY = "/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj/apply"


@pytest.fixture(params=["framework", "fast lane"])
def logged(request, settings):
    """A client, and a function that returns the lines of the log so far."""
    lane = "auto" if request.param == "fast lane" else "off"
    app = create_app(settings.model_copy(update={"fast_lane": lane}))

    log = io.StringIO()

    def lines():
        return [json.loads(line) for line in log.getvalue().splitlines()]

    configure_logging("debug", "json")
    logging.getLogger().handlers[0].setStream(log)
    app.state.observer._logs_all = True
    with serving(app) as url, httpx.Client(base_url=url) as client:
        yield client, lines


def requests_of(lines):
    time.sleep(0.05)  # a request is logged after its answer is sent
    return [one for one in lines() if one["event"] == "request"]


def test_fields_of_a_request(logged):
    client, lines = logged
    upload(client, "plain", TINY / "plain")
    headers = {"X-Request-Id": "abc", "traceparent": PARENT}
    assert client.post(APPLY, json={"inputs": [[0.5] * 64] * 3}, headers=headers).is_success
    refused = client.post(APPLY, json={"inputs": [[0.5] * 63]}, headers=headers).json()
    client.get("/v1/sets")
    client.get("/none")
    put, applied, other, listed, missing = requests_of(lines)
    assert put["ms"] > 0
    route = {"method": "PUT", "path": "/v1/sets/plain", "route": "/v1/sets/{set}"}
    assert put.items() >= {"status": 201, "set": "plain", **route}.items()
    assert put.keys().isdisjoint({"rows", "code", "detail", "trace_id", "key"})
    route = "/v1/sets/{set}/adapters/{module}/apply"
    about = {"method": "POST", "route": route, "set": "plain", "path": APPLY}
    ids = {"request_id": "abc", "trace_id": TRACE}
    assert applied.items() >= {"status": 200, "rows": 3, **about, **ids}.items()
    assert other.items() >= {"status": 422, "code": "shape_mismatch", **about, **ids}.items()
    assert other["detail"] == refused["detail"]
    assert refused.items() >= ids.items()
    assert listed.items() >= {"status": 200, "route": "/v1/sets"}.items()
    assert "set" not in listed
    assert missing.items() >= {"status": 404, "path": "/none"}.items()
    assert "route" not in missing


def test_busy_refusals_are_logged_up_to_a_rate_and_then_counted(capfd):
    configure_logging("info", "json")
    asyncio.run(_refuse_many())
    found = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [one.get("status") for one in found] == [503] * 10 + [404, None, 503]
    assert found[-2]["left_out"] == 15


async def _refuse_many():
    observer = Observer(Metrics(dict, dict))
    busy = {"method": "POST", "path": "/v1/apply", "request_id": "1", "problem": BusyError("full")}
    for _ in range(25):
        observer.observe(busy, 503, 0.0)
    observer.observe({**busy, "problem": SetNotFoundError("x")}, 404, 0.0)
    await asyncio.sleep(1.1)  # the rest is reported though nothing follows
    observer.observe(busy, 503, 0.0)


def test_inferences_have_their_set_and_rows(logged):
    client, lines = logged
    upload(client, "plain", TINY / "plain")
    tensor = {"name": "x", "shape": [2, 64], "datatype": "FP32", "data": [0.5] * 128}
    body = {"inputs": [tensor], "outputs": [{"name": "model.layers.0.self_attn.q_proj"}]}
    assert client.post("/v2/models/plain/infer", json=body).is_success
    found = requests_of(lines)[-1]
    assert found.items() >= {"set": "plain", "rows": 2, "status": 200}.items()


@pytest.mark.parametrize(
    "parent",
    [
        PARENT.upper(),
        f"01-{TRACE}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{PARENT}-extra",
        f"{PARENT}, {PARENT}",
        PARENT[:-1],
        f"{PARENT}\n",
        "",
    ],
)
def test_invalid_parents_are_ignored(parent):
    assert trace_id_of(parent.encode()) is None
    assert trace_id_of(PARENT.encode()) == TRACE


def test_two_parents_are_ignored_and_change_no_answer(logged):
    client, lines = logged
    headers = [("traceparent", PARENT), ("traceparent", PARENT)]
    answer = client.post("/v1/sets/none/apply", json={"inputs": [1]}, headers=headers)
    assert answer.status_code == 404
    assert "trace_id" not in answer.json()
    assert "trace_id" not in requests_of(lines)[-1]


def log_event():
    structlog.get_logger("bonsai_lora.test").warning(HOSTILE)


def log_value():
    structlog.get_logger("bonsai_lora.test").warning("event", name=HOSTILE)


def log_nested_value():
    structlog.get_logger("bonsai_lora.test").warning("event", names=[{HOSTILE: HOSTILE}, Odd()])


def log_foreign_message():
    logging.getLogger("other").warning("a %s", HOSTILE)


def log_foreign_logger():
    logging.getLogger(HOSTILE).warning("a")


def log_exception():
    try:
        fail()
    except ValueError:
        structlog.get_logger("bonsai_lora.test").exception("failed")


def log_foreign_exception():
    try:
        fail()
    except ValueError:
        logging.getLogger("other").exception("failed", stack_info=True)


def fail():
    raise ValueError(HOSTILE)


class Odd:
    def __repr__(self):
        return HOSTILE


@pytest.mark.parametrize(
    "log",
    [
        log_event,
        log_value,
        log_nested_value,
        log_foreign_message,
        log_foreign_logger,
        log_exception,
        log_foreign_exception,
    ],
)
@pytest.mark.parametrize("form", ["console", "json"])
def test_no_text_forges_a_line_or_controls_the_terminal(log, form, capfd):
    configure_logging("info", form)
    log()
    first, *rest = capfd.readouterr().err.removesuffix("\n").split("\n")
    assert first.isprintable()
    assert all(line.isprintable() and line.startswith("    ") for line in rest)
    assert bool(rest) == (form == "console" and "exception" in log.__name__)


def test_requests_forge_no_line(settings, capfd):
    lines = "%0a%0d2026-01-01T00:00:00Z%20forged%1b[2J%00%c2%85%e2%80%a8%ff"
    app = create_app(settings)
    configure_logging("debug", "console")
    app.state.observer._logs_all = True
    paths = [
        f"/v1/sets/{lines}",
        f"/v1/sets/{lines}/apply",
        f"/v1/sets/a/adapters/{lines}/apply",
        f"/v2/models/{lines}/infer",
        f"/{lines}",
        f"/v1/sets?limit={lines}",
        f"/v1/apply?scale={lines}",
        f"/v1/bases/{lines}",
        f"/{lines}/{lines}/resolve/main/{lines}",
    ]
    with serving(app) as url, httpx.Client(base_url=url) as client:
        for method in (b"GET", b"POST", b"PUT", b"DELETE"):
            for path in paths:
                with connect(client) as connection:
                    head = b"%b %b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n" % (
                        method,
                        path.encode(),
                    )
                    connection.sendall(head + b"Content-Type: a\x0b\x85\x1b[2J\r\n\r\n{}")
                    assert read_answer(connection)[0] >= 400
    found = capfd.readouterr().err.removesuffix("\n").split("\n")
    assert len(found) >= 4 * len(paths)
    for line in found:
        assert line.isprintable()
        assert line.startswith("20")
        assert "forged" not in line[:60]


def test_a_process_says_when_it_is_ready_and_when_it_stops(tmp_path):
    flags = ["--port", "0", "--store", str(tmp_path), "--log-format", "json", "--kernels", "off"]
    with subprocess.Popen([COMMAND, "serve", *flags], stderr=subprocess.PIPE, text=True) as process:
        lines = []
        while not lines or lines[-1]["event"] != "ready":
            lines.append(json.loads(process.stderr.readline()))
        (worker,) = workers_of(process)
        process.send_signal(signal.SIGTERM)
        lines += map(json.loads, process.stderr)
    assert process.returncode == 0
    assert [one["event"] for one in lines[-2:]] == ["ready", "stopped"]
    assert lines[-2].items() >= {"sets": 0, "pid": worker}.items()

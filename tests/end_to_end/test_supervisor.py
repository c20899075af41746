"""The process that replaces workers which died."""

import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from test_command import running, workers_of


def wait_for_other_workers(process, before):
    deadline = time.monotonic() + 10
    while not (now := set(workers_of(process))) or now & before or len(now) != len(before):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS, signal.SIGSEGV])
def test_a_killed_worker_is_replaced_within_two_seconds(tmp_path, count, number):
    with running("--store", str(tmp_path), "--workers", str(count)) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"})
        before = set(workers_of(process))
        assert len(before) == count
        started = time.monotonic()
        for pid in before:
            os.kill(pid, number)
        assert httpx.get(f"{url}/v1/sets/s", timeout=10).json()["name"] == "s"
        assert time.monotonic() - started < 2
        wait_for_other_workers(process, before)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_counters_outlive_a_worker(tmp_path):
    with running("--store", str(tmp_path)) as (url, process):
        for _ in range(5):
            httpx.get(f"{url}/v1/sets").raise_for_status()
        httpx.get(f"{url}/healthz")  # a request is counted after it is answered
        before = set(workers_of(process))
        os.kill(*before, signal.SIGKILL)
        wait_for_other_workers(process, before)
        httpx.get(f"{url}/v1/sets").raise_for_status()
        text = httpx.get(f"{url}/metrics").text
        assert 'requests_total{method="GET",route="/v1/sets",status="200"} 6.0' in text


def test_workers_number_their_requests_differently(tmp_path):
    with running("--store", str(tmp_path), "--workers", "3") as (url, _):
        answers = [httpx.get(f"{url}/healthz", timeout=30) for _ in range(40)]
    ids = [one.headers["x-request-id"] for one in answers]
    assert len(set(ids)) == len(ids)


def test_an_interrupt_of_the_terminal_ends_it(tmp_path):
    """Ctrl-C reaches the supervisor and its workers."""
    with running("--store", str(tmp_path)) as (url, process):
        httpx.get(f"{url}/healthz").raise_for_status()
        for pid in (process.pid, *workers_of(process)):
            os.kill(pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0


def test_nothing_is_left_behind(tmp_path):
    with running("--store", "memory:", TMPDIR=str(tmp_path)) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"}).raise_for_status()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert list(Path(tmp_path).iterdir()) == []

"""The process that replaces workers which died."""

import os
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import httpx
import pytest
from test_command import COMMAND, running, workers_of

ENDINGS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """A service ignores what its parent ignores, as nohup and shells in the background make it do."""
    ignored = [one for one in ENDINGS if signal.getsignal(one) is signal.SIG_IGN]
    for one in ignored:
        signal.signal(one, lambda *_: None)  # which no child inherits
    yield
    for one in ignored:
        signal.signal(one, signal.SIG_IGN)


def wait_for_other_workers(process, before):
    deadline = time.monotonic() + 10
    while not (now := set(workers_of(process))) or now & before or len(now) != len(before):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "count"),
    [(signal.SIGKILL, 1), (signal.SIGBUS, 1), (signal.SIGSEGV, 1), (signal.SIGKILL, 2)],
)
def test_a_killed_worker_is_replaced_within_two_seconds(tmp_path, number, count):
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


def test_a_worker_goes_on_with_the_counters_of_the_one_that_died(tmp_path):
    """Each scrape reads the files of all; with new ones after each death it took ever longer."""
    store, temporary = tmp_path / "store", tmp_path / "temporary"
    temporary.mkdir()
    flags = ["--store", str(store), "--workers", "2"]
    with running(*flags, TMPDIR=str(temporary)) as (url, process):
        files = set()
        for count in range(1, 5):
            for _ in range(6):  # both workers
                httpx.get(f"{url}/v1/sets", timeout=30).raise_for_status()
            text = httpx.get(f"{url}/metrics", timeout=30).text
            total = f'requests_total{{method="GET",route="/v1/sets",status="200"}} {6.0 * count}'
            assert total in text
            files.add(len(list(temporary.glob("*/counter_*.db"))))
            before = set(workers_of(process))
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            wait_for_other_workers(process, before)
        assert max(files) <= 2


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


def test_ctrl_c_lets_requests_in_flight_finish(tmp_path):
    """A terminal sends it to the whole process group, which `setsid` makes here."""
    head = "POST /v1/sets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with running("--store", str(tmp_path), "--workers", "1", command=("setsid", COMMAND)) as (
        url,
        process,
    ):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(f"{head}Content-Length: 13\r\n\r\n".encode())
            httpx.get(f"{url}/healthz").raise_for_status()  # the head was read by now
            # Two signals may arrive as one, so that the request alone does not show it.
            assert process.pid not in map(os.getpgid, workers_of(process))
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.5)
            client.sendall(b'{"name": "s"}')
            assert client.recv(4096).startswith(b"HTTP/1.1 201 ")
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("ending", "is_whole_group"),
    [(signal.SIGTERM, False), (signal.SIGHUP, False), *((one, True) for one in ENDINGS)],
)
def test_nothing_is_left_behind(tmp_path, ending, is_whole_group):
    path = tmp_path / "x.sock"
    flags = ["--store", "memory:", "--uds", str(path)]
    with running(*flags, TMPDIR=str(tmp_path)) as (address, process):
        url = address.partition(" and ")[0]
        httpx.post(f"{url}/v1/sets", json={"name": "s"}).raise_for_status()
        for pid in workers_of(process) if is_whole_group else []:
            os.kill(pid, ending)
        process.send_signal(ending)
        assert process.wait(timeout=20) == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_by_a_service_that_ends_while_it_starts(tmp_path, ending):
    command = [COMMAND, "serve", "--store", "memory:", "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path), "BONSAI_LORA_KERNELS": "off"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 20
        while not any(tmp_path.glob("*/service.lock")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(ending)
        assert process.wait(timeout=20) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_service_leaves_is_removed_by_the_next(tmp_path):
    with running("--store", "memory:", TMPDIR=str(tmp_path)) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"}).raise_for_status()
        mine = list(tmp_path.iterdir())
        # That of a service that runs stays.
        with running("--store", "memory:", TMPDIR=str(tmp_path)):
            os.utime(mine[0] / "service.lock", (0, 0))
            with running("--store", "memory:", TMPDIR=str(tmp_path)):
                assert httpx.get(f"{url}/v1/sets/s").status_code == 200
        process.kill()
    assert list(tmp_path.iterdir()) == mine
    (other := tmp_path / "bonsai-lora-data").mkdir()
    with running("--store", "memory:", TMPDIR=str(tmp_path)):
        assert not mine[0].exists()
    assert list(tmp_path.iterdir()) == [other]


def states_of(pids):
    return [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in pids]


def wait_for_states(pids, *expected):
    deadline = time.monotonic() + 10
    while not set(states_of(pids)) <= set(expected):
        assert time.monotonic() < deadline, states_of(pids)
        time.sleep(0.01)


def test_ctrl_z_stops_the_workers_too_until_the_service_is_continued(tmp_path):
    with running("--store", str(tmp_path), "--workers", "2") as (url, process):
        httpx.get(f"{url}/healthz").raise_for_status()
        everyone = [process.pid, *workers_of(process)]
        for _ in range(2):
            process.send_signal(signal.SIGTSTP)
            wait_for_states(everyone, "T")
            with pytest.raises(httpx.ReadTimeout):
                httpx.get(f"{url}/healthz", timeout=0.2)
            process.send_signal(signal.SIGCONT)
            wait_for_states(everyone, "S", "R")
            httpx.get(f"{url}/healthz").raise_for_status()
        process.send_signal(signal.SIGTSTP)
        wait_for_states(everyone, "T")
        process.send_signal(signal.SIGTERM)  # as a shell does that ends a stopped job
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=20) == 0


SWALLOWED = """
import os, signal, time
from bonsai_lora.cli.supervisor import Supervisor

class Swallowing:
    def __del__(self):
        print("started", flush=True)
        time.sleep(60)

def work():
    Swallowing()
    time.sleep(60)

Supervisor(work, 1, print).run()
"""


def test_a_worker_ends_by_a_signal_that_interrupts_a_finalizer(tmp_path):
    """Python ignores exceptions in finalizers."""
    with subprocess.Popen(
        [sys.executable, "-c", SWALLOWED], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "started\n"
        process.terminate()
        assert process.wait(timeout=10) == 0


ORPHANED = """
import os
import uvicorn
from bonsai_lora.cli.accept import Server

async def app(scope, receive, send):
    pass

reader, writer = os.pipe()
if os.fork():
    os.read(reader, 1)
    os._exit(0)
server = Server(uvicorn.Config(app, lifespan="off", log_config=None), 1, 0, print)
os.write(writer, b"x")
server.run(sockets=[])
print("ended", flush=True)
"""


def test_a_worker_without_a_supervisor_ends_without_a_signal():
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True
    ) as process:
        shown, _ = process.communicate(timeout=20)
    assert shown == "ended\n"


def test_nohup_is_respected(tmp_path):
    command = ("nohup", COMMAND)
    with running("--store", str(tmp_path), command=command) as (url, process):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        assert httpx.get(f"{url}/healthz").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def test_a_terminal_stops_no_worker_that_writes_to_it(tmp_path):
    """As `stty tostop` makes one do with processes in the background."""
    reader, terminal = os.openpty()
    attributes = termios.tcgetattr(terminal)
    attributes[3] |= termios.TOSTOP
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    path = tmp_path / "x.sock"
    flags = ["--store", str(tmp_path / "store"), "--uds", str(path), "--log-level", "debug"]
    command = ["setsid", "--ctty", COMMAND, "serve", "--kernels", "off", *flags]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with subprocess.Popen(command, **streams) as process, open(reader, "rb", 0) as screen:
        os.close(terminal)
        try:
            read_until(screen, b"serving on")
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=5) as client:
                for _ in range(2):
                    assert client.get("http://localhost/v1/sets").status_code == 200
                    read_until(screen, b"/v1/sets")
            process.terminate()
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def read_until(screen, text):
    shown = b""
    while text not in shown:
        shown += screen.read(1 << 16)


def test_a_draining_service_serves_but_is_not_ready(tmp_path):
    flags = ("--workers", "2", "--drain-seconds", "1.5")
    with running("--store", str(tmp_path), *flags) as (url, process):
        httpx.post(f"{url}/v1/sets", json={"name": "s"}).raise_for_status()
        before = time.monotonic()
        process.send_signal(signal.SIGTERM)
        deadline = before + 1
        while httpx.get(f"{url}/readyz").status_code == 200:
            assert time.monotonic() < deadline
        for path in ("/readyz", "/v2/health/ready"):
            assert httpx.get(url + path).status_code == 503
        assert httpx.get(f"{url}/readyz").json()["code"] == "shutting_down"
        assert httpx.get(f"{url}/healthz").status_code == 200
        assert httpx.get(f"{url}/v1/sets/s").status_code == 200
        assert process.wait(timeout=20) == 0
        assert time.monotonic() - before >= 1.5


@pytest.mark.parametrize("numbers", [(signal.SIGINT,), (signal.SIGTERM, signal.SIGTERM)])
def test_a_second_signal_or_an_interrupt_does_not_drain(tmp_path, numbers):
    with running("--store", str(tmp_path), "--drain-seconds", "60") as (url, process):
        httpx.get(f"{url}/healthz").raise_for_status()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        assert process.wait(timeout=20) == 0

"""Serving a Unix socket: who may connect, what is replaced, what is left behind."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import httpx
import numpy as np
import pytest
import reference
from test_command import running

from bonsai_lora.cli.listen import ListenError, listening
from bonsai_lora.cli.main import main
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

BINARY = {"Content-Type": "application/vnd.safetensors"}
URL = "http://localhost"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.sock"


@contextlib.contextmanager
def over(path, **options):
    """A client of the service on that socket, once it is ready."""
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(base_url=URL, transport=transport, timeout=30, **options) as client:
        deadline = time.monotonic() + 60
        while True:
            try:
                client.get("/readyz").raise_for_status()
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield client


def serve(path, store, *flags):
    return running("--uds", str(path), "--store", str(store), *flags, port=None)


def put_random(client, rng, rank, d_in, d_out):
    """Create the set `s` with a module `m`; return its matrices."""
    client.post("/v1/sets", json={"name": "s"}).raise_for_status()
    a = rng.standard_normal((rank, d_in)).astype(np.float32)
    b = rng.standard_normal((d_out, rank)).astype(np.float32)
    body = safetensors.encode({"lora_A": a, "lora_B": b})
    path = f"/v1/sets/s/adapters/m?alpha={rank}"
    client.put(path, content=body, headers=BINARY).raise_for_status()
    return a, b


def test_a_socket_answers_to_any_host_name(path, tmp_path, rng):
    """No browser connects to one."""
    with serve(path, tmp_path / "s"), over(path, headers={"Host": "evil.example"}) as client:
        put_random(client, rng, 2, 3, 4)
        body = b'{"inputs": [[1, 2, 3]]}'
        for content in (body, iter([body])):  # through the fast lane, and chunked
            answer = client.post("/v1/sets/s/adapters/m/apply", content=content)
            assert answer.status_code == 200
        # A proxy in front of the socket says which host the browser called.
        page = {"Origin": "https://lora.example", "X-Forwarded-Host": "lora.example"}
        assert client.post("/v1/sets", json={"name": "t"}, headers=page).status_code == 201
        page["Origin"] = "https://evil.example"
        assert client.post("/v1/sets", json={"name": "u"}, headers=page).status_code == 403


def test_only_the_socket_is_served_and_it_is_removed_on_exit(path, tmp_path, rng):
    with serve(path, tmp_path / "s", "--workers", "2") as (address, process):
        assert address == f"unix:{path}"
        status = path.lstat()
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o660
        with over(path) as client:
            a, b = put_random(client, rng, 16, 1024, 2048)
            for rows in (1, 3, 600):  # the last is 2.4 MB there and 4.9 MB back
                x = rng.standard_normal((rows, 1024)).astype(np.float32)
                sent = safetensors.encode({"inputs": x})
                answer = client.post("/v1/sets/s/adapters/m/apply", content=sent, headers=BINARY)
                got = safetensors.decode(answer.raise_for_status().content)[0]["outputs"]
                assert reference.relative_error(got, reference.apply(a, b, 1.0, x)) < 1e-6
            text = client.post("/v1/sets/s/adapters/m/apply", json={"inputs": x[0].tolist()})
            assert np.array_equal(np.float32(text.json()["outputs"]), got[0])
        assert listening_ports(process.pid) == set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
    assert not path.exists()


def listening_ports(pid):
    """The TCP ports that the process listens on (proc(5): state 0A)."""
    inodes = set()
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry.path)):
                inodes.add(found[1])
    ports = set()
    for name in ("tcp", "tcp6"):
        with open(f"/proc/{pid}/net/{name}") as table:
            for line in list(table)[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def test_a_port_is_served_too_if_given(path, tmp_path):
    flags = ["--uds", str(path), "--workers", "2", "--store", str(tmp_path / "s")]
    with running(*flags, port=None, BONSAI_LORA_PORT="0") as (address, process):
        url, _, rest = address.partition(" and ")
        assert rest == f"unix:{path}"
        with over(path) as client:
            assert client.post("/v1/sets", json={"name": "s"}).status_code == 201
        assert httpx.get(f"{url}/v1/sets/s").json()["name"] == "s"
        assert listening_ports(process.pid) == {int(url.rpartition(":")[2])}


def test_the_socket_of_a_killed_service_is_replaced(path, tmp_path):
    with serve(path, tmp_path / "s", "--workers", "2") as (_, process):
        process.kill()
        process.wait(timeout=20)
    assert stat.S_ISSOCK(path.lstat().st_mode)
    old = path.lstat().st_ino
    # An inode number may be reused immediately, so a second link keeps the old file.
    os.link(path, path.with_name("old"))
    with serve(path, tmp_path / "s"), over(path) as client:
        assert path.lstat().st_ino != old
        assert client.get("/healthz").status_code == 200
    assert not path.exists()


def test_a_socket_in_use_is_not_replaced(path, tmp_path, capsys):
    with serve(path, tmp_path / "s"):
        inode = path.lstat().st_ino
        assert main(["serve", "--uds", str(path), "--store", str(tmp_path / "t")]) == 2
        assert "another process is listening on it; choose" in capsys.readouterr().err
        assert path.lstat().st_ino == inode
        with over(path) as client:
            assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_other_files_are_not_replaced(path, tmp_path, capsys, kind):
    target = tmp_path / "target"
    {
        "file": lambda: path.write_text("mine"),
        "folder": path.mkdir,
        "link": lambda: path.symlink_to(target),
        "pipe": lambda: os.mkfifo(path),
    }[kind]()
    before = path.lstat()
    assert main(["serve", "--uds", str(path), "--store", str(tmp_path / "s")]) == 2
    said = capsys.readouterr().err
    assert f"cannot listen on the Unix socket {path}: the path is not a socket" in said
    assert path.lstat() == before
    assert not target.exists()


def test_invalid_paths(tmp_path, capsys):
    for uds in (tmp_path / "none" / "x.sock", tmp_path / ("x" * 120), tmp_path):
        assert main(["serve", "--uds", str(uds), "--store", str(tmp_path / "s")]) == 2
        assert f"cannot listen on the Unix socket {uds}: " in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_one_of_many_that_start_together_over_a_stale_socket_serves(path):
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from bonsai_lora.cli.listen import ListenError, listening\n"
        "from bonsai_lora.settings import Settings\n"
        "print('here', flush=True)\n"
        "sys.stdin.readline()\n"
        "try:\n"
        f"    with listening(Settings(uds=Path({str(path)!r}))):\n"
        "        print('serving', flush=True)\n"
        "        sys.stdin.readline()\n"
        "except ListenError as error:\n"
        "    print(error, flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    some = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    try:
        for one in some:
            assert one.stdout.readline() == "here\n"
        for one in some:
            one.stdin.write("\n")
            one.stdin.flush()
        said = [one.stdout.readline() for one in some]
        assert said.count("serving\n") == 1
        assert sum("another process is listening" in line for line in said) == 5
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    finally:
        for one in some:
            one.communicate("\n", timeout=20)
    assert not path.exists()


def test_other_users_can_never_connect(path):
    """The mode is 0660 before anyone can connect, whatever the umask was."""
    before = os.umask(0)
    seen = []
    ended = threading.Event()

    def watch():
        while not ended.is_set():
            with contextlib.suppress(FileNotFoundError):
                seen.append(stat.S_IMODE(path.lstat().st_mode))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(200):
            with listening(Settings(uds=path)) as (listener,):
                assert listener.family == socket.AF_UNIX
                time.sleep(0)  # lets the watcher look
        assert os.umask(0) == 0
    finally:
        ended.set()
        watcher.join()
        os.umask(before)
    assert set(seen) == {0o660}


def test_another_services_socket_is_not_removed_on_exit(path):
    with listening(Settings(uds=path)):
        path.unlink()
        other = socket.socket(socket.AF_UNIX)
        other.bind(str(path))
    assert path.exists()
    other.close()


def test_a_port_in_use_leaves_no_socket_behind(path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(ListenError, match=r"with --host and --port"),
            listening(Settings(uds=path, port=port)),
        ):
            pytest.fail("the port was taken")
    assert not path.exists()


def test_shared_memory_over_a_unix_socket(path, tmp_path, capsys):
    flags = ["--shared-memory", "--host", "0.0.0.0"]
    with serve(path, tmp_path / "s", *flags), over(path) as client:
        assert "system_shared_memory" in client.get("/v2").json()["extensions"]
    words = ["serve", "--uds", str(path), "--port", "0", *flags]
    assert main(words) == 2
    assert "loopback" in capsys.readouterr().err


# httpcore leaves a socket that could not connect to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_client_commands_over_the_socket(path, tmp_path, capsys):
    with serve(path, tmp_path / "s"), over(path) as client:
        client.post("/v1/sets", json={"name": "mine"})
        assert main(["ls", "--uds", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["name"] == "mine"
        assert main(["pull", "adapters/mine", "--uds", str(path), "-o", str(tmp_path / "o")]) == 0
        assert (tmp_path / "o" / "adapter_model.safetensors").is_file()
        capsys.readouterr()
    assert main(["ls", "--uds", str(path)]) == 3
    assert f"no service at unix:{path}: " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ls", "--uds", str(path), "--url", URL])
    assert "not allowed with" in capsys.readouterr().err


def test_copies_of_a_listener_never_block(path):
    """Blocking is a flag of the socket itself: one worker's copies would make all others wait."""
    with listening(Settings(uds=path, port=0, no_auth=True)) as listeners:
        assert {one.family for one in listeners} == {socket.AF_INET, socket.AF_UNIX}
        for one in listeners:
            with one.dup() as copy:
                assert not os.get_blocking(copy.fileno())
            assert not os.get_blocking(one.fileno())

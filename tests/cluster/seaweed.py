"""SeaweedFS, a server of S3, on free ports of the loopback address."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

WEED = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
BUCKET = "sets"
KEY = "test-key"
_PARTS = ("master", "volume", "filer", "s3")
_START_SECONDS = 60


@contextlib.contextmanager
def seaweed(folder):
    """Run a server whose data are in `folder`; yield it."""
    assert WEED, "weed is missing; run make test-cluster"
    server = Seaweed(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


class Seaweed:
    """A server whose data are in `folder`."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.ports = {name: _free_port() for part in _PARTS for name in (part, f"{part}.grpc")}
        self.endpoint = f"http://127.0.0.1:{self.ports['s3']}"
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process = None
        self.variables = {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_ENDPOINT": self.endpoint,
            "AWS_REGION": "us-east-1",
        }

    def start(self):
        ports = [
            f"-{part}.port{ending}={self.ports[part + ending]}"
            for part in _PARTS
            for ending in ("", ".grpc")
        ]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(
            [
                *(WEED, "server", f"-dir={self.folder}", "-ip=127.0.0.1"),
                *("-ip.bind=127.0.0.1", "-filer", "-s3", *ports),
                *("-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"),
                f"-s3.config={self.folder}/s3.json",
                *("-master.volumeSizeLimitMB=64", "-volume.max=20"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        deadline = time.monotonic() + _START_SECONDS
        while not self._answers():
            assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
            assert self._process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.1)

    def stop(self):
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=20)
        self._process = None
        for port in self.ports.values():  # a killed server leaves its sockets
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()

    def store(self, prefix):
        """Return the URL of a store of its own."""
        return f"s3://{BUCKET}/{prefix}"

    def _answers(self):
        """Return whether objects can be written; makes the bucket."""
        from obstore import exceptions, put
        from obstore.store import S3Store

        try:
            httpx.get(self.endpoint, timeout=1)
        except httpx.TransportError:
            return False
        store = S3Store(
            BUCKET,
            endpoint=self.endpoint,
            access_key_id=KEY,
            secret_access_key=KEY,
            region="us-east-1",
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        try:
            put(store, "probe", b"probe")
        except (exceptions.BaseError, FileNotFoundError):
            self._make_bucket()
            return False
        return True

    def _make_bucket(self):
        """Make the bucket by the filer's own API."""
        httpx.post(f"http://127.0.0.1:{self.ports['filer']}/buckets/{BUCKET}/", timeout=5)


def _free_port():
    """Return a port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

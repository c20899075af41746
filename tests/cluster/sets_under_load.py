"""Reads and applies of many sets by several clients, and what failed of them."""

import collections
import itertools
import threading

import httpx

NAMES = [f"set-{number}" for number in range(60)]
CLIENTS = 4


def create_all(client):
    for name in NAMES:
        client.post("/v1/sets", json={"name": name}).raise_for_status()
        body = {"d_in": 64, "d_out": 64}
        client.put(f"/v1/sets/{name}/adapters/m", json=body).raise_for_status()


class Load:
    """Sends requests while it is entered; `sent` and `failed` count them by kind."""

    def __init__(self, url):
        self.url = url
        self.sent = collections.Counter()
        self.failed = collections.Counter(read=0, apply=0)
        self.errors = collections.Counter()
        """What the failed ones got: a status with its code, or the broken connection."""
        self._ends = threading.Event()
        self._clients = [threading.Thread(target=self._run, args=[one]) for one in range(CLIENTS)]

    def __enter__(self):
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        for client in self._clients:
            client.join(timeout=60)

    def __str__(self):
        return f"sent {dict(self.sent)}, failed {dict(self.failed)}"

    def _run(self, number):
        with httpx.Client(base_url=self.url, timeout=30) as client:
            for name in itertools.cycle(NAMES[number:] + NAMES[:number]):
                if self._ends.is_set():
                    return
                self._send(client, "read", "GET", f"/v1/sets/{name}")
                row = {"inputs": [[1.0] * 64]}
                self._send(client, "apply", "POST", f"/v1/sets/{name}/adapters/m/apply", json=row)

    def _send(self, client, kind, method, path, **options):
        self.sent[kind] += 1
        try:
            answer = client.request(method, path, **options)
        except httpx.TransportError as error:
            self.failed[kind] += 1
            self.errors[repr(error)] += 1
            return
        if answer.status_code != 200:
            self.failed[kind] += 1
            self.errors[f"{kind}: {answer.status_code} {answer.text[:200]}"] += 1

"""Stores of many small sets, and what is asked of services over them: part of store.py."""

import contextlib
import itertools
import time
from collections.abc import Callable
from pathlib import Path

from measure import in_turns

import httpx

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.storage.newset import NextVersion
from bonsai_lora.storage.store import SetStore

Make = Callable[[httpx.Client, int], Callable[[], object]]
"""Returns what asks a service over so many sets."""


def make_small_sets(root: Path, count: int) -> None:
    """Write `count` sets of one tiny module, as copies of a set that the store wrote."""
    store, name = SetStore(root), "set-000000"
    made = BonsaiLoraSet.new(LoraConfig(rank=1), "base", name).add_adapters({"m": (4, 4)})
    with store.lock(name):
        store.write(
            NextVersion(
                lora_set=made, origin="initialized", now="2026-01-01T00:00:00Z", previous=None
            )
        )
    raw = (root / "sets" / f"{name}.safetensors").read_bytes()
    for index in range(1, count):
        other = f"set-{index:06}"
        path = root / "sets" / f"{other}.safetensors"
        path.write_bytes(raw.replace(name.encode(), other.encode()))


def wait_until_ready(url: str) -> None:
    while True:
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"{url}/readyz", timeout=300).raise_for_status()
            return
        time.sleep(0.01)


def asked_rows(
    services: dict[int, httpx.Client], asked: dict[str, Make]
) -> list[dict[str, object]]:
    """Ask the services, by their numbers of sets, in turns; return a row for each question."""
    rows = []
    for what, ask in asked.items():
        rivals = {str(count): ask(client, count) for count, client in services.items()}
        seconds = in_turns(rivals, seconds=4)
        figures = " / ".join(f"{seconds[str(count)] * 1e3:.2f}" for count in services)
        sizes = " / ".join(f"{count:,}" for count in services)
        rows.append({"what": f"{what}, {sizes} sets", "figure": f"{figures} ms"})
    return rows


def getting(path: str) -> Make:
    """Return what makes a call that gets a path, with the name of a set in the middle."""

    def make(client: httpx.Client, count: int):
        url = path.format(middle=f"set-{count // 2:06}")
        return lambda: client.get(url).raise_for_status()

    return make


def getting_each(path: str, step: int) -> Make:
    """Return what makes a call that gets a path with the next name each time, `step` further on."""

    def make(client: httpx.Client, count: int):
        numbers = itertools.count(0, step)
        return lambda: client.get(
            path.format(name=f"set-{next(numbers) % count:06}")
        ).raise_for_status()

    return make


def creating(client: httpx.Client, _count: int):
    numbers = itertools.count()
    body = {"mlp": {"hidden_size": 4, "intermediate_size": 4}, "config": {"rank": 1}}
    return lambda: client.post(
        "/v1/sets", json={"name": f"new-{next(numbers)}", **body}
    ).raise_for_status()


def deleting(client: httpx.Client, _count: int):
    numbers = itertools.count()
    return lambda: client.delete(f"/v1/sets/new-{next(numbers)}")


ASKED: dict[str, Make] = {
    "creating a set": creating,
    "deleting a set": deleting,
    "GET /v1/sets/{set}": getting("/v1/sets/{middle}"),
    "GET /v1/sets, a page of 100": getting("/v1/sets?cursor={middle}"),
    "the same for one base": getting("/v1/sets?cursor={middle}&base_model_name=base"),
    "the same for a prefix": getting("/v1/sets?prefix=set-0000"),
    "GET /readyz": getting("/readyz"),
    "GET /metrics": getting("/metrics"),
    "GET /v1/stats": getting("/v1/stats"),
}

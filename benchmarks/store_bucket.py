"""Costs by number of sets over a bucket of SeaweedFS on this machine: part of store.py."""

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from server import COMMAND, serving
from store_sizes import (
    ASKED,
    asked_rows,
    getting,
    getting_each,
    make_small_sets,
    wait_until_ready,
)

import httpx

from bonsai_lora.storage.bucket import Bucket, open_bucket
from bonsai_lora.storage.pointer import POINTERS, encode_pointer, pointer_of
from bonsai_lora.storage.setfile import record_of

sys.path.append(str(Path(__file__).parent.parent / "tests/cluster"))
from seaweed import seaweed

UNKNOWN = {
    "GET /v1/sets, a page of 100 pointers that were not read yet": getting_each(
        "/v1/sets?cursor={name}", 100
    ),
}
FORGETFUL = {
    "GET /v1/sets/{set}, compared with the bucket": getting("/v1/sets/{middle}"),
    "GET /v1/sets/{set}, fetched": getting_each("/v1/sets/{name}", 1),
}
"""What is asked of services that compare before each request, and have room for two copies."""


def bucket_rows(folder: Path, counts: list[int]) -> list[dict[str, object]]:
    """Costs by number of sets: two services for each number, asked in turns."""
    rows = []
    (folder / "weed").mkdir()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(seaweed(folder / "weed"))
        os.environ |= server.variables
        services, forgetful = {}, {}
        for count in counts:
            url = server.store(f"sized-{count}")
            most_bytes = fill(folder / f"sized-{count}", url, count)
            collected = collecting_seconds(url)

            def start(name: str, *flags: str, store: str = url) -> httpx.Client:
                flags = ("--store", store, "--cache", str(folder / name), *flags)
                address, _ = stack.enter_context(serving(*flags))
                wait_until_ready(address)
                return stack.enter_context(httpx.Client(base_url=address, timeout=60))

            started = time.perf_counter()
            services[count] = start(f"cache-{count}")
            ready = time.perf_counter() - started
            rows.append({"what": f"{count:,} sets: gc / start until ready, with an empty cache",
                         "figure": f"{collected:.2f} s / {ready:.2f} s"})  # fmt: skip
            little = ("--stale-seconds", "0", "--cache-bytes", str(2 * most_bytes))
            forgetful[count] = start(f"forgetful-{count}", *little)
        many = {count: one for count, one in services.items() if count >= 10_000}
        rows += asked_rows(many, UNKNOWN) + asked_rows(services, ASKED)
        return rows + asked_rows(forgetful, FORGETFUL)


def fill(folder: Path, url: str, count: int) -> int:
    """Put small sets into a store; return the length of the largest blob in bytes."""
    make_small_sets(folder, count)
    bucket = open_bucket(url)
    with ThreadPoolExecutor(16) as threads:
        paths = list((folder / "sets").glob("*.safetensors"))
        return max(threads.map(lambda path: put_set(bucket, path), paths))


def put_set(bucket: Bucket, path: Path) -> int:
    """Put a set into a bucket as `BucketStore` does, without the sums, which `gc` counts."""
    with path.open("rb") as file:
        record = record_of(path, file)
    raw = path.read_bytes()
    pointer = pointer_of(record, len(raw), hashlib.sha256(raw).hexdigest())
    bucket.write(pointer.blob, path)
    bucket.put(f"{POINTERS}/{record.name}", encode_pointer(pointer), replaces=None)
    return len(raw)


def collecting_seconds(url: str) -> float:
    """Return how long `gc` takes, which counts the sums and writes the index."""
    started = time.perf_counter()
    command = [COMMAND, "gc", "--store", url]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started

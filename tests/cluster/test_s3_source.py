"""A set that is pulled from a bucket of a real server of S3."""

import json

import httpx
import numpy as np
import obstore
import pytest
from conftest import TINY, assert_problem
from obstore.store import S3Store
from seaweed import BUCKET, KEY, WEED, Seaweed
from test_command import running
from test_workers import wait_until_ready

from bonsai_lora.formats import safetensors

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]
CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def weed(tmp_path_factory):
    assert WEED, "weed is missing; run make test-cluster"
    server = Seaweed(tmp_path_factory.mktemp("weed"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def bucket(weed):
    return S3Store(
        BUCKET,
        prefix="loras",
        endpoint=weed.endpoint,
        access_key_id=KEY,
        secret_access_key=KEY,
        region="us-east-1",
        client_options={"allow_http": True},
    )


@pytest.fixture
def start(weed, tmp_path):
    """Serve with one origin, whose credentials are in the environment."""

    def start(secret):
        origin = {
            "name": "prod",
            "kind": "s3",
            "url": f"s3://{BUCKET}/loras",
            "region": "us-east-1",
            "endpoint": weed.endpoint,
            "allow_private": True,
            "allow_http": True,
            "access_key_variable": "PROD_ACCESS",
            "secret_key_variable": "PROD_SECRET",
        }
        path = tmp_path / "sources.json"
        path.write_text(json.dumps({"sources": [origin]}))
        flags = ("--store", str(tmp_path / "store"), "--sources", str(path), "--workers", "2")
        return running(*flags, PROD_ACCESS=KEY, PROD_SECRET=secret)

    return start


def put_adapter(bucket, folder, path="acme/sql"):
    for name in (CONFIG, MODEL):
        obstore.put(bucket, f"{path}/{name}", (TINY / folder / name).read_bytes())


def pull(url, source="prod:acme/sql", name="pulled"):
    return httpx.put(f"{url}/v1/sets/{name}", json={"source": source}, timeout=60)


def test_a_set_follows_the_bucket(start, bucket):
    put_adapter(bucket, "plain")
    with start(KEY) as (url, _):
        wait_until_ready(url)
        made = pull(url)
        assert made.status_code == 201, made.text
        assert (pull(url).status_code, pull(url).json()["version"]) == (200, 1)
        put_adapter(bucket, "rslora-patterns")
        assert pull(url).json()["version"] == 2
        assert_problem(pull(url, "prod:acme/nothing", "none"), 422, "source_refused")
        weights = httpx.get(f"{url}/v1/sets/pulled/{MODEL}").content
        found = safetensors.decode(weights)[0]
    expected = safetensors.decode((TINY / "rslora-patterns" / MODEL).read_bytes())[0]
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_wrong_secret_pulls_nothing(start, bucket):
    put_adapter(bucket, "plain")
    with start("wrong") as (url, _):
        wait_until_ready(url)
        problem = assert_problem(pull(url), 422, "source_refused")
        assert "status 403" in problem["detail"]
        assert httpx.get(f"{url}/v1/sets").json()["sets"] == []

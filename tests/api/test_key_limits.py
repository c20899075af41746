"""What a key may use: requests, rows, sets and bytes, and until when."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from conftest import TINY, assert_problem, serving, snapshot, upload
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings

APPLY = "/v1/sets/acme.s/adapters/m/apply"


@pytest.fixture(params=["auto", "off"], ids=["lane", "framework"])
def guarded(request, tmp_path):
    """Keys, and a function that makes an application for them."""
    made = KeysFileMaker(tmp_path / "keys.json")
    settings = {"store": str(tmp_path / "store"), "fast_lane": request.param}

    def start(**more):
        return create_app(Settings(**settings, keys_file=made.path, **more))

    return made, start


def prepare(client):
    assert client.post("/v1/sets", json={"name": "acme.s"}).status_code == 201
    body = {"d_in": 2, "d_out": 2}
    assert client.put("/v1/sets/acme.s/adapters/m", json=body).status_code == 201


def test_requests_per_second(guarded):
    made, start = guarded
    free, slow = made.add(), made.add(limits={"requests_per_second": 3})
    with serving(start()) as url, caller(url, free) as client, caller(url, slow) as limited:
        prepare(client)
        answers = [limited.post(APPLY, json={"inputs": [[1, 2]]}) for _ in range(5)]
        assert [one.status_code for one in answers] == [200, 200, 200, 429, 429]
        problem = assert_problem(answers[-1], 429, "rate_limited")
        assert problem["limit"] == "requests_per_second"
        assert answers[-1].headers["Retry-After"] == "1"
        assert limited.get("/v1/sets").status_code == 429
        assert limited.get("/v2/models/acme.s").json().keys() == {"error"}
        assert limited.get("/healthz").status_code == 200
        assert client.post(APPLY, json={"inputs": [[1, 2]]}).status_code == 200


def test_rows_per_second(guarded):
    made, start = guarded
    free, slow = made.add(), made.add(limits={"rows_per_second": 10})
    with serving(start()) as url, caller(url, free) as client, caller(url, slow) as limited:
        prepare(client)
        rows = {"inputs": [[1, 2]] * 8}
        answers = [limited.post(APPLY, json=rows) for _ in range(8)]
        assert answers[0].status_code == 200
        answer = next(one for one in answers if one.status_code != 200)
        assert assert_problem(answer, 429, "rate_limited")["limit"] == "rows_per_second"
        mixed = {"module": "m", "sets": ["acme.s"] * 8, "inputs": [[1, 2]] * 8}
        assert limited.post("/v1/apply", json=mixed).status_code == 429
        tensor = {"name": "m", "shape": [8, 2], "datatype": "FP32", "data": [1] * 16}
        infer = limited.post("/v2/models/acme.s/infer", json={"inputs": [tensor]})
        assert infer.status_code == 429
        assert client.post(APPLY, json=rows).status_code == 200


def test_quota_of_sets_and_bytes(guarded):
    made, start = guarded
    root = made.add(["read", "apply", "write", "admin"], [""])
    # Of acme.s; a module of rank 8 takes 32 bytes for each input and output.
    held, most = 128, 128 + 300 * 32
    token = made.add(quota={"sets": 2, "bytes": most})
    app = start()
    with serving(app) as url, caller(url, root) as client, caller(url, token) as tenant:
        upload(client, "other.s", TINY / "plain")  # counts for nobody but its owner
        prepare(tenant)
        assert tenant.post("/v1/sets", json={"name": "acme.t"}).status_code == 201
        before = snapshot(app.state.store)
        answer = tenant.post("/v1/sets", json={"name": "acme.u"})
        assert assert_problem(answer, 507, "quota_exceeded")["limit"] == 2
        wide = {"d_in": 100, "d_out": 201}
        answer = tenant.put("/v1/sets/acme.t/adapters/m", json=wide)
        problem = assert_problem(answer, 507, "quota_exceeded")
        sizes = {"needed_bytes": 301 * 32, "held_bytes": held, "limit_bytes": most}
        assert problem.items() >= sizes.items()
        answer = upload(tenant, "acme.t", TINY / "plain")
        assert_problem(answer, 507, "quota_exceeded")
        assert snapshot(app.state.store) == before
        fitting = {"d_in": 100, "d_out": 200}
        assert tenant.put("/v1/sets/acme.t/adapters/m", json=fitting).status_code == 201
        assert tenant.delete("/v1/sets/acme.t").status_code == 204
        assert tenant.post("/v1/sets", json={"name": "acme.u"}).status_code == 201


def test_the_budget_is_everybodys_but_what_others_hold_is_not_told(guarded):
    made, start = guarded
    root, token = made.add(["write", "admin"], [""]), made.add()
    with (
        serving(start(memory_budget_bytes=200_000)) as url,
        caller(url, root) as client,
        caller(url, token) as tenant,
    ):
        for name in ("other.s", "other.t"):
            assert upload(client, name, TINY / "plain").status_code == 201
        one = assert_problem(
            upload(tenant, "acme.s", TINY / "plain"), 507, "memory_budget_exceeded"
        )
        other = assert_problem(upload(client, "t", TINY / "plain"), 507, "memory_budget_exceeded")
        assert "held_bytes" not in one
        assert str(other["held_bytes"]) not in json.dumps(one)


def test_an_expired_key_is_401(guarded):
    made, start = guarded
    now = datetime.now(UTC)
    old = made.add(expires_at=(now - timedelta(seconds=1)).isoformat())
    new = made.add(expires_at=(now + timedelta(hours=1)).isoformat())
    with serving(start()) as url, caller(url, old) as late, caller(url, new) as client:
        for _ in range(2):
            answer = late.get("/v1/sets")
            assert "has expired" in assert_problem(answer, 401, "unauthenticated")["detail"]
            assert late.post(APPLY, json={"inputs": [[1, 2]]}).status_code == 401
        assert client.get("/v1/sets").status_code == 200

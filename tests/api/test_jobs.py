"""Jobs: a request that is answered later, seen and cancelled from anywhere, and its ends."""

import asyncio
import json
import os
import threading
import time
from dataclasses import replace
from functools import partial

import httpx
import pytest
from conftest import assert_problem, peft_config, peft_tensors, serving, snapshot, upload_parts
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app
from bonsai_lora.api.routes import lab
from bonsai_lora.errors import StoreFullError, StoreReadOnlyError, StoreUnreachableError
from bonsai_lora.service import combine, jobs
from bonsai_lora.service.budget import Budget
from bonsai_lora.service.keys import ANYONE
from bonsai_lora.service.work import Lane
from bonsai_lora.settings import Settings
from bonsai_lora.storage.jobs import HEARTBEAT_SECONDS, JobFolder, new_record

ASYNC = {"Prefer": "respond-async"}
BODY = {"name": "new", "sets": [{"set": "a", "weight": 0.5}, {"set": "a"}]}


def ended(client, number, seconds=10):
    """The job when it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = client.get(f"/v1/jobs/{number}").json()
        if job["state"] not in ("queued", "running"):
            return job
        time.sleep(0.01)
    raise AssertionError(job)


@pytest.fixture
def one(client, rng):
    """A client, and the set `a`."""
    upload_parts(client, "a", peft_config(), peft_tensors(rng))
    return client


@pytest.fixture
def gate(monkeypatch):
    """Combinations wait for this event before their first module."""
    opened = threading.Event()
    compute = combine.Plan.works

    def works(plan, progress):
        return [partial(run, one) for one in compute(plan, progress)]

    def run(one):
        assert opened.wait(10)
        return one()

    monkeypatch.setattr(combine.Plan, "works", works)
    yield opened
    opened.set()


def submit(client, **changes):
    response = client.post("/v1/combine", json=BODY | changes, headers=ASYNC)
    assert response.status_code == 202, response.text
    return response


def test_a_combination_as_a_job(one):
    response = submit(one)
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert response.headers["preference-applied"] == "respond-async"
    assert (job["kind"], job["state"], job["result"], job["error"]) == (
        "combine",
        "queued",
        None,
        None,
    )
    done = ended(one, job["id"])
    assert (done["state"], done["progress"], done["eta_seconds"]) == ("done", 1.0, None)
    assert done["result"]["report"]["rank"] == 8
    again = one.post("/v1/combine", json=BODY | {"name": "again"}).json()
    assert done["result"]["report"] == again["report"]
    assert one.get("/v1/sets/new").json()["origin"] == "combined"
    page = one.get("/v1/jobs").json()
    assert page == {"jobs": [done | {"result": None}], "next_cursor": None}


LOOKS = ["/v1/compare?set=a&set=a", "/v1/sets/a/spectrum"]


@pytest.mark.parametrize("path", LOOKS)
def test_a_long_look_is_a_job_if_that_is_preferred(one, monkeypatch, path):
    answer = one.get(path)
    quick = one.get(path, headers=ASYNC)
    assert (quick.status_code, quick.content) == (200, answer.content)
    monkeypatch.setattr(lab, "LONG_NANOSECONDS", 0.0)
    assert one.get(path).content == answer.content
    response = one.get(path, headers=ASYNC)
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    job = ended(one, response.json()["id"])
    assert job["kind"] in path
    assert (job["state"], job["progress"], job["result"]) == ("done", 1.0, answer.json())


@pytest.mark.parametrize("path", LOOKS)
@pytest.mark.parametrize("error", [StoreReadOnlyError, StoreFullError, StoreUnreachableError])
def test_a_look_is_answered_where_no_job_can_be_stored(one, monkeypatch, path, error):
    def refuse(*_):
        raise error("no")

    answer = one.get(path)
    monkeypatch.setattr(lab, "LONG_NANOSECONDS", 0.0)
    monkeypatch.setattr(JobFolder, "add", refuse)
    now = one.get(path, headers=ASYNC)
    assert (now.status_code, now.content) == (200, answer.content)


def test_what_is_wrong_is_refused_at_once(one):
    wrong = BODY | {"sets": [{"set": "absent"}]}
    response = one.post("/v1/combine", json=wrong, headers=ASYNC)
    assert_problem(response, 404, "set_not_found")
    assert one.get("/v1/jobs").json()["jobs"] == []
    assert_problem(one.get("/v1/jobs/019a1f2b3c4d0123456789abcdef"), 404, "job_not_found")
    for name in ("lock", "..%2Flock"):
        assert_problem(one.delete(f"/v1/jobs/{name}"), 404, "job_not_found")


def test_a_failure_is_the_error_of_the_job(one, gate):
    number = submit(one).json()["id"]
    assert one.post("/v1/sets", json={"name": "new"}).status_code == 201  # while it computes
    gate.set()
    job = ended(one, number)
    assert (job["state"], job["result"], job["error"]["code"]) == ("failed", None, "set_exists")
    assert job["error"]["set"] == "new"


def test_a_running_job_is_cancelled(one, gate, store, monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.02)
    before = snapshot(store)
    number = submit(one).json()["id"]
    while one.get(f"/v1/jobs/{number}").json()["state"] != "running":
        time.sleep(0.01)
    # As another worker would: by the record alone.
    JobFolder(store.root / "jobs").update(number, jobs._cancelled)
    time.sleep(0.1)
    gate.set()
    assert ended(one, number)["state"] == "cancelled"
    assert snapshot(store) == before
    assert one.delete(f"/v1/jobs/{number}").json()["state"] == "cancelled"


def test_jobs_wait_for_their_turn_and_for_memory(one, gate, app, monkeypatch):
    monkeypatch.setattr(jobs, "BEAT_SECONDS", 0.05)
    numbers = [submit(one, name=f"n{index}").json()["id"] for index in range(jobs.AT_ONCE + 1)]
    last = numbers.pop()
    for number in numbers:
        while one.get(f"/v1/jobs/{number}").json()["state"] != "running":
            time.sleep(0.01)
    assert one.get(f"/v1/jobs/{last}").json()["state"] == "queued"
    assert one.delete(f"/v1/jobs/{last}").json()["state"] == "cancelled"  # at once
    gate.set()
    assert [ended(one, number)["state"] for number in numbers] == ["done"] * len(numbers)
    assert ended(one, last)["state"] == "cancelled"
    assert one.get("/v1/sets/n2").status_code == 404
    page = one.get("/v1/jobs?limit=2").json()
    rest = one.get(f"/v1/jobs?limit=2&cursor={page['next_cursor']}").json()
    assert [job["id"] for job in page["jobs"] + rest["jobs"]] == [last, *numbers[::-1]]
    memory = app.state.context.memory
    assert memory.reserved_bytes == 0
    memory.reserve(memory.total_bytes)
    waiting = submit(one, name="late").json()["id"]
    time.sleep(0.1)
    assert one.get(f"/v1/jobs/{waiting}").json()["state"] == "queued"
    memory.release(memory.total_bytes)
    assert ended(one, waiting)["state"] == "done"


def test_there_are_limits(tmp_path, rng, gate):
    settings = Settings(store=str(tmp_path), max_jobs=1, work_memory_bytes=1 << 20)
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        upload_parts(client, "a", peft_config(), peft_tensors(rng))
        submit(client)
        busy = client.post("/v1/combine", json=BODY | {"name": "b"}, headers=ASYNC)
        assert_problem(busy, 503, "busy")
        gate.set()
    upload = peft_tensors(rng, d_in=3000, d_out=3000)
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        upload_parts(client, "a", peft_config(), upload)
        large = client.post("/v1/combine", json=BODY | {"name": "b"}, headers=ASYNC)
        assert_problem(large, 507, "memory_budget_exceeded")


def test_a_stopped_service_fails_its_jobs(settings, rng, gate):
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        upload_parts(client, "a", peft_config(), peft_tensors(rng))
        number = submit(client).json()["id"]
        gate_thread = threading.Timer(0.2, gate.set)
        gate_thread.start()
    gate_thread.join()
    with serving(create_app(settings)) as url, httpx.Client(base_url=url) as client:
        job = client.get(f"/v1/jobs/{number}").json()
        assert (job["state"], job["error"]["code"]) == ("failed", "job_interrupted")
        assert client.get("/v1/sets/new").status_code == 404


def test_a_killed_runner_is_noticed(one, store):
    folder = JobFolder(store.root / "jobs")
    record = new_record("extract", "anyone")
    folder.add(replace(record, state="running", heartbeat=time.time() - HEARTBEAT_SECONDS - 1))
    job = one.get(f"/v1/jobs/{record.id}").json()
    assert (job["state"], job["error"]["code"]) == ("failed", "job_interrupted")
    assert one.delete(f"/v1/jobs/{record.id}").json()["state"] == "failed"


def test_jobs_are_kept_for_a_day(tmp_path):
    folder = JobFolder(tmp_path / "jobs")
    records = [new_record("combine", "anyone") for _ in range(3)]
    for record in records:
        folder.add(replace(record, state="done"))
    old = tmp_path / "jobs" / f"{records[0].id}.json"
    os.utime(old, (0, time.time() - 86_401))
    (tmp_path / "jobs" / f"{records[1].id}.json").write_text(json.dumps({"format": 9}))
    folder.write_result(records[0].id, {"rank": 1})
    assert folder.read_result(records[0].id) == {"rank": 1}
    added = new_record("combine", "anyone")
    folder.add(added)
    assert folder.read_result(records[0].id) is None
    assert set(folder.ids()) == {records[1].id, records[2].id, added.id}
    assert folder.read(records[1].id) is None
    assert folder.read("../lock") is None


def test_a_job_belongs_to_its_key(tmp_path, rng):
    keys = KeysFileMaker(tmp_path / "keys.json")
    alice, bob = (keys.add(scopes=["read", "write"], prefixes=[""]) for _ in range(2))
    admin = keys.add(scopes=["read", "admin"])
    settings = Settings(store=str(tmp_path / "store"), keys_file=keys.path)
    with serving(create_app(settings)) as url:
        with caller(url, alice) as one:
            upload_parts(one, "a", peft_config(), peft_tensors(rng))
            number = submit(one).json()["id"]
            assert ended(one, number)["state"] == "done"
        with caller(url, bob) as other:
            assert_problem(other.get(f"/v1/jobs/{number}"), 404, "job_not_found")
            assert_problem(other.delete(f"/v1/jobs/{number}"), 404, "job_not_found")
            assert other.get("/v1/jobs").json()["jobs"] == []
        with caller(url, admin) as above:
            assert above.get(f"/v1/jobs/{number}").status_code == 200
            assert len(above.get("/v1/jobs").json()["jobs"]) == 1


def test_an_unexpected_error_is_logged_and_not_shown(tmp_path):
    async def run():
        lane = Lane("jobs", 1, 1)
        runner = jobs.Jobs(JobFolder(tmp_path / "jobs"), lane, Budget(10))

        async def work(_progress):
            raise ZeroDivisionError("secret")

        record = await runner.submit(ANYONE, "combine", 1, work)
        await asyncio.gather(*runner._tasks)
        await asyncio.sleep(0)  # until the lane knows
        assert lane.in_progress == 0
        return await runner.get(ANYONE, record.id)

    job = asyncio.run(run())
    assert (job.state, job.error["code"]) == ("failed", "internal_error")
    assert "secret" not in str(job.error)

"""Keys: who may call what, and that no name of others gets in or out, by any door."""

import json
import re
import shutil

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from conftest import TINY, assert_problem, serving, snapshot, upload
from keyring import TENANT_SCOPES, KeysFileMaker, caller
from lfs import ask, assert_refused, pointing_lines
from starlette.routing import Route
from test_hub_push import push

from bonsai_lora.api.app import create_app
from bonsai_lora.api.scopes import OPEN, SIGNED, scope_of
from bonsai_lora.fast_lane.routes import lane_routes
from bonsai_lora.formats import safetensors
from bonsai_lora.service.view import SetView
from bonsai_lora.settings import Settings
from bonsai_lora.storage.protocol import Store

MODULE = "model.layers.0.self_attn.q_proj"
OWN, FOREIGN, ABSENT = "acme.one", "umbra.one", "umbra.two"
"""Names of the same length: one of the tenant's, one of somebody else's, one that nobody has."""
ROW = [0.5] * 64


@pytest.fixture(scope="module", params=["auto", "off"], ids=["lane", "framework"])
def world(request, tmp_path_factory):
    """A service with keys, with the sets OWN and FOREIGN."""
    root = tmp_path_factory.mktemp("keys")
    shutil.copytree(TINY / "base", root / "bases" / "tiny-qwen3")
    made = KeysFileMaker(root / "keys.json")
    keys = {
        "root": made.add([*TENANT_SCOPES, "admin"], [""]),
        "tenant": made.add(),
        "admin": made.add(["admin"], []),
        **{scope: made.add([scope]) for scope in TENANT_SCOPES},
    }
    app = create_app(
        Settings(
            store=str(root / "store"),
            bases=str(root / "bases"),
            keys_file=made.path,
            fast_lane=request.param,
            shared_memory=True,
        )
    )
    with serving(app) as url:
        with caller(url, keys["root"]) as client:
            for name in (OWN, FOREIGN):
                assert upload(client, name, TINY / "plain").status_code == 201
        found = World(app, url, keys)
        yield found
        found.close()


class World:
    def __init__(self, app, url, keys):
        self.app, self.url, self.keys = app, url, keys
        self._clients = {}

    def close(self):
        for client in self._clients.values():
            client.close()

    def __getattr__(self, name):
        """A client with the key of this name; `nobody` has none."""
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._clients:
            self._clients[name] = caller(self.url, self.keys.get(name))
        return self._clients[name]


def safetensors_body(**metadata):
    return safetensors.encode(
        {"inputs": np.full((1, 64), 0.5, np.float32)},
        {name: json.dumps(value) for name, value in metadata.items()},
    )


def binary(client, path, **metadata):
    return client.post(
        path,
        content=safetensors_body(**metadata),
        headers={"Content-Type": "application/vnd.safetensors"},
    )


def mixed_infer(client, names, **parameters):
    return client.post(
        "/v2/models/mixed/infer",
        json={
            "inputs": [
                {"name": "sets", "shape": [len(names)], "datatype": "BYTES", "data": names},
                {
                    "name": MODULE,
                    "shape": [len(names), 64],
                    "datatype": "FP32",
                    "data": ROW * len(names),
                },
            ]
        },
    )


def infer_body():
    return {"inputs": [{"name": MODULE, "shape": [1, 64], "datatype": "FP32", "data": ROW}]}


SET = "/v1/sets/{}"
ADAPTER = f"/v1/sets/{{}}/adapters/{MODULE}"
MERGED = "/v1/bases/tiny-qwen3/merged"
DOORS = {
    "set": lambda c, n: c.get(SET.format(n)),
    "set head": lambda c, n: c.head(SET.format(n)),
    "config": lambda c, n: c.get(f"/v1/sets/{n}/adapter_config.json"),
    "weights": lambda c, n: c.get(f"/v1/sets/{n}/adapter_model.safetensors"),
    "range": lambda c, n: c.get(
        f"/v1/sets/{n}/adapter_model.safetensors", headers={"Range": "bytes=0-9"}
    ),
    "adapters": lambda c, n: c.get(f"/v1/sets/{n}/adapters"),
    "adapter": lambda c, n: c.get(ADAPTER.format(n)),
    "stats": lambda c, n: c.get(f"/v1/sets/{n}/stats"),
    "apply": lambda c, n: c.post(ADAPTER.format(n) + "/apply", json={"inputs": [ROW]}),
    "apply binary": lambda c, n: binary(c, ADAPTER.format(n) + "/apply"),
    "apply's sets": lambda c, n: c.post(
        ADAPTER.format(OWN) + "/apply",
        json={"inputs": [ROW], "sets": [{"set": n, "weight": 1.0}]},
    ),
    "apply's metadata": lambda c, n: binary(
        c, ADAPTER.format(OWN) + "/apply", sets=[{"set": n, "weight": 1.0}]
    ),
    "apply many": lambda c, n: c.post(f"/v1/sets/{n}/apply", json={"inputs": {MODULE: [ROW]}}),
    "apply many's sets": lambda c, n: c.post(
        f"/v1/sets/{OWN}/apply",
        json={"inputs": {MODULE: [ROW]}, "sets": [{"set": n, "weight": 1.0}]},
    ),
    "apply mixed": lambda c, n: c.post(
        "/v1/apply", json={"module": MODULE, "sets": [OWN, n], "inputs": [ROW, ROW]}
    ),
    "apply mixed's stack": lambda c, n: c.post(
        "/v1/apply",
        json={"module": MODULE, "sets": [[{"set": n, "weight": 0.5}]], "inputs": [ROW]},
    ),
    "apply mixed binary": lambda c, n: binary(c, "/v1/apply", module=MODULE, sets=[n]),
    "merge": lambda c, n: c.post(ADAPTER.format(n) + "/merge", json={"weights": [ROW] * 128}),
    "merged files": lambda c, n: c.get(f"{MERGED}/{n}"),
    "merged file": lambda c, n: c.get(f"{MERGED}/{n}/model-00001-of-00003.safetensors"),
    "merged head": lambda c, n: c.head(f"{MERGED}/{n}/model-00001-of-00003.safetensors"),
    "merged with": lambda c, n: (
        c.get(f"{MERGED}/{OWN}/model-00001-of-00003.safetensors", params={"set": n})
        if n != OWN
        else c.get(f"{MERGED}/{OWN}")
    ),
    "hub merged": lambda c, n: c.get(
        f"/tiny-qwen3/{n}/resolve/main/model-00001-of-00003.safetensors"
    ),
    "hub adapter": lambda c, n: c.get(f"/adapters/{n}/resolve/main/adapter_config.json"),
    "hub head": lambda c, n: c.head(f"/adapters/{n}/resolve/main/adapter_config.json"),
    "hub info": lambda c, n: c.get(f"/api/models/adapters/{n}"),
    "hub revision": lambda c, n: c.get(f"/api/models/tiny-qwen3/{n}/revision/main"),
    "hub tree": lambda c, n: c.get(f"/api/models/adapters/{n}/tree/main"),
    "hub refs": lambda c, n: c.get(f"/api/models/adapters/{n}/refs"),
    "hub commits": lambda c, n: c.get(f"/api/models/tiny-qwen3/{n}/commits/main"),
    "hub paths": lambda c, n: c.post(f"/api/models/adapters/{n}/paths-info/main"),
    "hub auth check": lambda c, n: c.get(f"/api/models/adapters/{n}/auth-check"),
    "model": lambda c, n: c.get(f"/v2/models/{n}"),
    "model version": lambda c, n: c.get(f"/v2/models/{n}/versions/1"),
    "model ready": lambda c, n: c.get(f"/v2/models/{n}/ready"),
    "model config": lambda c, n: c.get(f"/v2/models/{n}/config"),
    "model stats": lambda c, n: c.get(f"/v2/models/{n}/stats"),
    "infer": lambda c, n: c.post(f"/v2/models/{n}/infer", json=infer_body()),
    "infer version": lambda c, n: c.post(f"/v2/models/{n}/versions/1/infer", json=infer_body()),
    "infer mixed": lambda c, n: mixed_infer(c, [OWN, n]),
    "infer mixed's stack": lambda c, n: mixed_infer(c, [json.dumps([{"set": n, "weight": 0.5}])]),
}
"""Every way in which a read or an apply names a set."""

WRITES = {
    "create": lambda c, n: c.post("/v1/sets", json={"name": n}),
    "upload": lambda c, n: upload(c, n, TINY / "plain"),
    "rename base": lambda c, n: c.patch(f"/v1/sets/{n}", json={"base_model_name": "b"}),
    "put adapter": lambda c, n: c.put(f"/v1/sets/{n}/adapters/new", json={"d_in": 2, "d_out": 2}),
    "delete adapter": lambda c, n: c.delete(ADAPTER.format(n)),
    "delete": lambda c, n: c.delete(f"/v1/sets/{n}"),
    "push": push,
    "push's weights": lambda c, n: push(c, n, *pointing_lines()),
    "LFS batch": ask,
}


def said(answer, name):
    """What an answer says, without what differs between two requests about two names."""
    headers = {key: value for key, value in answer.headers.items() if key != "date"}
    text = json.dumps([answer.status_code, headers, answer.text]).replace(name, "NAME")
    return text.replace(answer.headers["x-request-id"], "ID")


@pytest.mark.parametrize("door", DOORS)
def test_a_foreign_set_is_as_absent_as_one_that_nobody_has(world, door):
    ask = DOORS[door]
    assert ask(world.tenant, OWN).status_code in (200, 206)
    foreign, absent = ask(world.tenant, FOREIGN), ask(world.tenant, ABSENT)
    assert foreign.status_code == (401 if door.startswith("hub") else 404)
    if door.startswith("hub"):
        assert foreign.headers["X-Error-Code"] == "RepoNotFound"
    assert said(foreign, FOREIGN) == said(absent, ABSENT)
    assert ask(world.root, FOREIGN).status_code in (200, 206)


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_foreign_name_is_refused_whether_or_not_it_exists(world, write):
    before = snapshot(world.app.state.store)
    for name in (FOREIGN, ABSENT):
        answer = WRITES[write](world.tenant, name)
        if write == "LFS batch":
            assert "may not write to 'umbra." in assert_refused(answer, 403)
            continue
        problem = assert_problem(answer, 403, "name_not_yours")
        assert problem["expected"] == ["acme."]
        assert "starts with 'acme.'" in problem["detail"]
    assert snapshot(world.app.state.store) == before


def test_lists_and_statistics_show_only_what_the_key_may_see(world):
    tenant = world.tenant
    assert [one["name"] for one in tenant.get("/v1/sets").json()["sets"]] == [OWN]
    for cursor in (FOREIGN, ABSENT, "acme.a"):
        shown = tenant.get("/v1/sets", params={"cursor": cursor}).json()
        assert FOREIGN not in json.dumps(shown)
    stats = tenant.get("/v1/stats").json()
    assert stats["set_count"] == 1
    assert [one["name"] for one in stats["sets"]] == [OWN]
    assert [one["id"] for one in tenant.get("/api/models").json()] == [
        f"adapters/{OWN}",
        "bases/tiny-qwen3",
        f"tiny-qwen3/{OWN}",
    ]
    index = tenant.post("/v2/repository/index").json()
    assert [one["name"] for one in index] == [OWN, "mixed"]
    shown = tenant.get("/v2/models/stats").json()["model_stats"]
    assert [one["name"] for one in shown] == [OWN]
    assert len(world.root.get("/v2/models/stats").json()["model_stats"]) == 3
    assert tenant.get("/v2/models/mixed/stats").status_code == 403
    assert len(world.root.get("/v1/sets").json()["sets"]) == 2


def test_what_is_open_needs_no_key_and_has_no_names(world):
    for path in ("/", "/healthz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"):
        assert world.nobody.get(path).status_code == 200
    assert world.nobody.get("/page/swagger-init.js").status_code == 200
    ready = {
        "status": "ready",
        "sets": 2,
        "bad_file_count": 0,
        "newer_file_count": 0,
        "not_imported_count": 0,
        "store_writable": True,
        "bases_readable": True,
    }
    assert world.nobody.get("/readyz").json() == ready
    assert world.tenant.get("/readyz").json() == ready


EXAMPLES = {
    "set": FOREIGN,
    "name": FOREIGN,
    "model": FOREIGN,
    "owner": "adapters",
    "base": "tiny-qwen3",
    "module": MODULE,
    "version": "1",
    "revision": "main",
    "filename:path": "config.json",
    "path:path": "adapter_config.json",
    "region": "r",
    "job": "0" * 28,
    "oid": "0" * 64,
}


def calls_of(app):
    """Yield method, path and needed scope of each route, with the name of a foreign set."""
    for route in app.state.routes:
        path = re.sub(r"\{([^}]*)\}", lambda found: EXAMPLES[found[1]], route.path)
        for method in sorted(route.methods):
            yield method, path, scope_of(method, route.path)


def test_every_route_but_the_open_ones_needs_a_key_with_its_scope(world):
    scopes = set()
    for method, path, need in calls_of(world.app):
        scopes.add(need)
        answer = world.nobody.request(method, path)
        if need == OPEN:
            assert answer.status_code not in (401, 403), path
            continue
        if need == SIGNED:  # a key is no signature, whatever it may do
            for name in ("nobody", "root", *TENANT_SCOPES):
                assert "no signature" in assert_refused(getattr(world, name).put(path), 403)
            continue
        assert answer.status_code == 401, (method, path)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.headers["Cache-Control"] == "private"
        for scope in (*TENANT_SCOPES, "admin"):
            if scope != need:
                refused = getattr(world, scope).request(method, path)
                assert refused.status_code == 403, (method, path, scope)
                assert method == "HEAD" or repr(need) in refused.text
    assert scopes == {OPEN, SIGNED, "read", "apply", "write", "admin"}


def test_the_walk_is_over_all_routes(world):
    walked = {id(one) for one in world.app.state.routes}
    for one in world.app.routes:
        inner = one.original_router.routes if hasattr(one, "original_router") else [one]
        assert {id(route) for route in inner} <= walked
    assert all(isinstance(one, Route) for one in world.app.state.routes)
    assert {one.need for one in lane_routes(world.app)} == {"apply"}


def test_no_route_tells_a_tenant_of_a_foreign_set(world):
    """Whatever the route is, and whatever it checks first."""
    seen = 0
    for method, path, need in calls_of(world.app):
        if FOREIGN not in path or need not in TENANT_SCOPES:
            continue
        seen += 1
        foreign = world.tenant.request(method, path)
        absent = world.tenant.request(method, path.replace(FOREIGN, ABSENT))
        assert foreign.status_code >= 400, (method, path)
        assert said(foreign, FOREIGN) == said(absent, ABSENT)
    assert seen > 30


def test_unknown_paths_and_methods_need_a_key_too(world):
    for method, path in [("GET", "/v3"), ("POST", "/v1/sets/x"), ("OPTIONS", "/v1/sets")]:
        assert world.nobody.request(method, path).status_code == 401
    assert world.tenant.get("/v3").status_code == 404


def test_every_way_of_the_store_passes_the_view():
    """A view has what the store has, and no way around: the store is private."""
    ours = {name for name in dir(Store) if not name.startswith("_")}
    theirs = {name for name in dir(SetView) if not name.startswith("_")}
    assert theirs - ours == {
        *("seen_by", "check_name", "check_budget", "check_quota", "reader"),
        *("all_sums", "records", "find_record", "held_bytes"),  # of pages and sums
        *("staging", "link_secret"),  # of what is staged
    }


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "bearer x",
        "Bearer bl_aaaaaaaa_" + "A" * 43,
        "Basic !!!",
        "Basic YTpi",
        "Digest x",
        "Bearer \xff",
    ],
)
def test_no_key_or_an_unknown_one_is_401(world, header):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    with httpx.Client(base_url=world.url) as client:
        for method, path in [("GET", "/v1/sets"), ("POST", ADAPTER.format(OWN) + "/apply")]:
            answer = client.request(method, path, headers=headers, content=b"{}")
            assert_problem(answer, 401, "unauthenticated")
        assert client.get("/v2/models/x", headers=headers).json().keys() == {"error"}


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("bl_aaaaaaaa_hidden", "the Authorization header has no Bearer or Basic credentials"),
        ("Token hidden", "the Authorization header has no Bearer or Basic credentials"),
        ("Basic hidden!", "the Authorization header has no Bearer or Basic credentials"),
        ("Bearer", "the request has no key"),
        ("Bearer hidden", "the key is unknown"),
    ],
)
def test_what_is_wrong_with_the_header_is_named(world, header, fault):
    answer = httpx.get(f"{world.url}/v1/sets", headers={"Authorization": header})
    assert answer.json()["detail"].startswith(fault)
    assert "hidden" not in answer.text


def test_a_large_body_without_a_key_is_refused_at_its_head(world):
    before = snapshot(world.app.state.store)
    body = bytes(64 << 20)
    for method, path in [("PUT", SET.format(OWN)), ("POST", ADAPTER.format(OWN) + "/apply")]:
        with httpx.Client(base_url=world.url, timeout=60) as client:
            answer = client.request(method, path, content=body)
        assert_problem(answer, 401, "unauthenticated")
    assert snapshot(world.app.state.store) == before


def test_a_key_with_another_secret_is_unknown(world):
    token = world.keys["tenant"]
    other = token[:-2] + ("AA" if token[-2:] != "AA" else "BB")
    with caller(world.url, other) as client:
        assert_problem(client.get("/v1/sets"), 401, "unauthenticated")
        assert other not in client.get("/v1/sets").text


def test_a_key_can_be_the_password_of_basic(world):
    with httpx.Client(base_url=world.url, auth=("any", world.keys["tenant"])) as client:
        assert client.get(SET.format(OWN)).status_code == 200
        assert client.get(SET.format(FOREIGN)).status_code == 404


def test_tritonclient_sends_it_as_a_header(world):
    headers = {"Authorization": f"Bearer {world.keys['tenant']}"}
    with triton.InferenceServerClient(world.url.removeprefix("http://")) as server:
        assert server.is_model_ready(OWN, headers=headers)
        assert not server.is_model_ready(FOREIGN, headers=headers)
        tensor = triton.InferInput(MODULE, [1, 64], "FP32")
        tensor.set_data_from_numpy(np.full((1, 64), 0.5, np.float32))
        assert server.infer(OWN, [tensor], headers=headers).as_numpy(MODULE).shape == (1, 128)


def test_a_hub_client_learns_which_key_it_has(world):
    assert world.tenant.get("/api/whoami-v2").json()["name"] == world.keys["tenant"].split("_")[1]
    refused = world.nobody.get("/api/whoami-v2")
    assert (refused.status_code, refused.headers["X-Error-Code"]) == (401, "RepoNotFound")


def test_answers_to_callers_with_keys_are_private(world):
    answer = world.tenant.post(ADAPTER.format(OWN) + "/apply", json={"inputs": [ROW]})
    assert answer.headers["Cache-Control"] == "private"
    assert world.tenant.get(SET.format(OWN)).headers["Cache-Control"] == "private"
    assert "Cache-Control" not in world.tenant.get("/healthz").headers


def test_only_an_administrator_computes_in_shared_memory(world):
    body = infer_body()
    body["inputs"][0].pop("data")
    body["inputs"][0]["parameters"] = {
        "shared_memory_region": "r",
        "shared_memory_byte_size": 256,
    }
    path = f"/v2/models/{OWN}/infer"
    assert world.tenant.post(path, json=body).status_code == 403
    assert world.root.post(path, json=body).status_code != 403


def test_metrics_are_for_administrators(world):
    assert world.tenant.get("/metrics").status_code == 403
    text = world.admin.get("/metrics").text
    assert "bonsai_lora_sets 2.0" in text
    assert "bonsai_lora_keys_file_errors_total 0.0" in text
    assert OWN not in text


def test_the_view_of_all_routes_is_of_a_caller(world):
    """The context that connections hold sees nothing, should a route ever use it."""
    assert world.app.state.context.store.records() == []

"""`?version=`: that version of a set, or 404; never another one."""

import pytest
from conftest import assert_problem

SET = "/v1/sets/plain"
MODULE = f"{SET}/adapters/model.layers.0.self_attn.q_proj"
CALLS = [
    ("GET", SET, {}),
    ("GET", f"{SET}/adapter_config.json", {}),
    ("GET", f"{SET}/adapter_model.safetensors", {}),
    ("GET", f"{SET}/adapter.gguf", {}),
    ("GET", f"{SET}/stats", {}),
    ("GET", f"{SET}/spectrum", {}),
    ("GET", f"{SET}/adapters", {}),
    ("GET", MODULE, {}),
    ("POST", f"{MODULE}/apply", {"inputs": [[0.0] * 64]}),
    ("POST", f"{SET}/apply", {"inputs": {"model.layers.0.self_attn.q_proj": [[0.0] * 64]}}),
    ("POST", f"{MODULE}/merge", {"weights": [[0.0] * 64] * 64}),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS, ids=[one[1] for one in CALLS])
def test_a_call_takes_the_version_that_it_wants(plain, method, path, body):
    def call(version):
        more = {"json": body} if body else {}
        return plain.request(method, path, params={"version": version}, **more)

    assert call("1").status_code == plain.request(method, path, json=body or None).status_code
    for version in ("2", "9007199254740991"):
        problem = assert_problem(call(version), 404, "version_not_found")
        assert (problem["got"], problem["expected"], problem["set"]) == (int(version), 1, "plain")
    for version in ("0", "-1", "1.5", "one", "1e0", "99999999999999999999"):
        assert_problem(call(version), 422, "invalid_request")
    assert_problem(
        plain.request(method, path.replace("plain", "other"), params={"version": "1"}, json=body),
        404,
        "set_not_found",
    )


def test_a_version_that_was_replaced_is_gone(plain):
    assert plain.patch(SET, json={"base_model_name": "other"}).json()["version"] == 2
    assert plain.get(SET, params={"version": "2"}).json()["base_model_name"] == "other"
    assert_problem(plain.get(SET, params={"version": "1"}), 404, "version_not_found")
    assert plain.head(SET, params={"version": "2"}).status_code == 200
    assert plain.head(SET, params={"version": "1"}).status_code == 404

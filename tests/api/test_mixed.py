"""Rows of one batch through different sets; scales and stacks."""

import itertools
import json

import numpy as np
import pytest
import reference
from conftest import TINY, assert_problem, read_tensors, upload
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_apply import BINARY, Q_PROJ, decoded
from test_merge import BASE

from bonsai_lora.formats import safetensors

NAMES = ("small", "large", "third", "plain")
QUARTERS = st.integers(-8, 8).map(lambda n: n / 4)
RANKS = {"small": 1, "large": 64, "third": 5}


@pytest.fixture
def several(client, rng):
    """Sets of four ranks for one module of 64 -> 128."""
    upload(client, "plain", TINY / "plain")
    for name, rank in RANKS.items():
        client.post("/v1/sets", json={"name": name, "config": {"rank": rank, "alpha": 3.0}})
        tensors = {
            "lora_A": rng.standard_normal((rank, 64)).astype(np.float32),
            "lora_B": rng.standard_normal((128, rank)).astype(np.float32),
        }
        answer = client.put(
            f"/v1/sets/{name}/adapters/{Q_PROJ}",
            content=safetensors.encode(tensors),
            headers={"Content-Type": BINARY},
        )
        assert answer.status_code == 201
    return client


def mixed(client, sets, x, **query):
    body = {"module": Q_PROJ, "sets": sets, "inputs": x.tolist()}
    return client.post("/v1/apply", json=body, params=query)


def mixed_binary(client, sets, x, module=Q_PROJ, **query):
    metadata = {"module": module, "sets": json.dumps(sets)}
    body = safetensors.encode({"inputs": x}, metadata)
    return client.post("/v1/apply", content=body, headers={"Content-Type": BINARY}, params=query)


def deltas(client, x, scale=1.0):
    """What each set adds for each row, by single applies of one row."""
    body = [safetensors.encode({"inputs": row}) for row in x]
    path, headers = f"adapters/{Q_PROJ}/apply?scale={scale}", {"Content-Type": BINARY}
    return {
        name: np.stack(
            [
                decoded(client.post(f"/v1/sets/{name}/{path}", content=one, headers=headers))[
                    "outputs"
                ]
                for one in body
            ]
        )
        for name in NAMES
    }


rows = st.one_of(
    st.none(),
    st.sampled_from(NAMES),
    st.lists(
        st.tuples(st.sampled_from(NAMES), QUARTERS),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ).map(lambda pairs: [{"set": name, "weight": weight} for name, weight in pairs]),
)


def weights_of(entry):
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {entry: 1.0}
    return {one["set"]: one["weight"] for one in entry}


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sets=st.lists(rows, min_size=1, max_size=12).filter(any))
def test_a_mixed_batch_equals_row_by_row_applies(several, sets):
    x = np.random.default_rng(len(sets)).standard_normal((len(sets), 64)).astype(np.float32)
    alone = deltas(several, x)
    expected = [
        sum(
            (weight * alone[name][row] for name, weight in weights_of(entry).items()), np.zeros(128)
        )
        for row, entry in enumerate(sets)
    ]
    as_binary = decoded(mixed_binary(several, sets, x))["outputs"]
    answer = mixed(several, sets, x).json()
    assert answer["module"] == Q_PROJ
    named = {name for entry in sets for name in weights_of(entry)}
    assert answer["versions"].keys() == named
    assert np.array_equal(np.array(answer["outputs"], np.float32), as_binary)
    size = max(np.abs(one).max() for one in alone.values())
    assert np.abs(as_binary - expected).max() <= 4e-6 * size


def test_rows_keep_their_order(several, rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    sets = ["small", "large", None, "third"]
    whole = decoded(mixed_binary(several, sets, x))["outputs"]
    for order in itertools.permutations(range(4)):
        turned = decoded(mixed_binary(several, [sets[i] for i in order], x[list(order)]))
        assert np.array_equal(turned["outputs"], whole[list(order)])


def test_metadata_of_binary_responses_and_a_quoted_module(several, rng):
    x = rng.standard_normal((2, 64)).astype(np.float32)
    answer = mixed_binary(several, ["small", None], x, module=json.dumps(Q_PROJ))
    tensors, metadata = safetensors.decode(answer.content)
    assert metadata["module"] == Q_PROJ
    assert json.loads(metadata["versions"]) == {"small": 2}
    assert not tensors["outputs"][1].any()


def test_a_row_may_be_one_weighted_set(several, rng):
    x = rng.standard_normal((1, 64)).astype(np.float32)
    weighted = {"set": "small", "weight": 2}
    one = decoded(mixed_binary(several, [weighted], x))["outputs"]
    assert np.array_equal(one, decoded(mixed_binary(several, [[weighted]], x))["outputs"])


def test_weights_and_scales_never_turn_zero_into_infinity(several):
    sets = [{"set": "small", "weight": 1e6}, None]
    outputs = decoded(mixed_binary(several, sets, np.zeros((2, 64), np.float32), scale=1e6))[
        "outputs"
    ]
    assert not outputs.any()


def test_one_vector(several):
    x = np.ones(64, np.float32)
    outputs = mixed(several, ["small"], x).json()["outputs"]
    assert np.array(outputs).shape == (128,)


@pytest.mark.parametrize("scale", [0.0, -1.5, 0.25])
def test_scale_multiplies_the_whole_delta(several, rng, scale):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    alone, scaled = deltas(several, x), deltas(several, x, scale)
    for name in NAMES:
        assert reference.relative_error(scaled[name], scale * alone[name].astype(float)) < 1e-6
    got = decoded(mixed_binary(several, ["large", None, "small"], x, scale=scale))["outputs"]
    assert reference.relative_error(got[0], scale * alone["large"][0].astype(float)) < 1e-6
    many = several.post(
        f"/v1/sets/plain/apply?scale={scale}", json={"inputs": {Q_PROJ: x.tolist()}}
    )
    got = np.array(many.json()["outputs"][Q_PROJ], np.float32)
    assert reference.relative_error(got, scale * alone["plain"].astype(float)) < 1e-6


@pytest.mark.parametrize("scale", [1.0, 0.1, -2.7])
def test_a_row_is_bit_identical_by_every_route(several, rng, scale):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    alone = deltas(several, x, scale)
    got = decoded(mixed_binary(several, ["large", "small", "large"], x, scale=scale))["outputs"]
    for row, name in enumerate(["large", "small", "large"]):
        assert np.array_equal(got[row], alone[name][row])
        one = deltas(several, x[row : row + 1], scale)[name]
        assert np.array_equal(one[0], alone[name][row])


@pytest.mark.parametrize("scale", ["nan", "inf", "1e7", "x", ""])
def test_invalid_scales(several, scale):
    body = {"inputs": [0.0] * 64}
    answer = several.post(f"/v1/sets/small/adapters/{Q_PROJ}/apply?scale={scale}", json=body)
    assert "scale" in assert_problem(answer, 422, "invalid_request")["detail"]


def test_stacked_sets_with_many_modules(several, rng):
    x = rng.standard_normal((3, 64)).astype(np.float32)
    alone = deltas(several, x)
    sets = [{"set": "small", "weight": 0.5}, "third"]
    expected = alone["plain"] + 0.5 * alone["small"].astype(float) + alone["third"]
    as_json = several.post(
        "/v1/sets/plain/apply", json={"inputs": {Q_PROJ: x.tolist()}, "sets": sets}
    ).json()
    assert as_json["versions"] == {"plain": 1, "small": 2, "third": 2}
    assert reference.relative_error(np.array(as_json["outputs"][Q_PROJ]), expected) < 1e-6
    body = safetensors.encode({"inputs": x}, {"sets": json.dumps(sets)})
    answer = several.post(
        f"/v1/sets/plain/apply?module={Q_PROJ}", content=body, headers={"Content-Type": BINARY}
    )
    assert reference.relative_error(decoded(answer)[Q_PROJ], expected) < 1e-6
    path = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
    single = several.post(path, json={"inputs": x.tolist(), "sets": sets}).json()
    assert single["versions"] == {"plain": 1, "small": 2, "third": 2}
    assert reference.relative_error(np.array(single["outputs"]), expected) < 1e-6
    answer = several.post(path, content=body, headers={"Content-Type": BINARY})
    assert reference.relative_error(decoded(answer)["outputs"], expected) < 1e-6
    weighed = several.post(
        "/v1/sets/plain/apply?scale=2",
        json={"inputs": {Q_PROJ: x.tolist()}, "sets": [{"set": "plain", "weight": 0.25}]},
    ).json()
    expected = 0.5 * alone["plain"].astype(float)
    assert reference.relative_error(np.array(weighed["outputs"][Q_PROJ]), expected) < 1e-6


@pytest.mark.parametrize(
    ("sets", "status", "code"),
    [
        (["nobody", "small"], 404, "set_not_found"),
        (["small"], 422, "shape_mismatch"),
        (["small", "small", "small"], 422, "shape_mismatch"),
        ([None, None], 422, "invalid_request"),
        ([None, []], 422, "invalid_request"),
        ([1, None], 422, "invalid_request"),
        (["small", [{"set": "small"}, {"set": "small"}]], 422, "invalid_request"),
        (["small", [{"weight": 1}]], 422, "invalid_request"),
        (["small", [{"set": "small", "weight": True}]], 422, "invalid_request"),
        (["small", [{"set": "small", "weight": 1e39}]], 422, "invalid_request"),
        (["small", {"set": "small", "weight": 2e6}], 422, "invalid_request"),
        (["small", [{"set": "small", "wight": 1}]], 422, "invalid_request"),
        (["small", [{"set": 3}]], 422, "invalid_request"),
        (["small", [f"set{i}" for i in range(33)]], 422, "invalid_request"),
        ("small", 422, "invalid_request"),
        (None, 422, "invalid_request"),
    ],
)
def test_invalid_sets(several, sets, status, code):
    x = np.zeros((2, 64), np.float32)
    assert_problem(mixed(several, sets, x), status, code)
    assert_problem(mixed_binary(several, sets, x), status, code)


def test_nan_and_infinite_weights(several):
    for weight in ("NaN", "1e400", "1" + "0" * 400):
        body = (
            f'{{"module":"{Q_PROJ}","sets":[[{{"set":"small","weight":{weight}}}]],"inputs":[[0]]}}'
        )
        answer = several.post(
            "/v1/apply", content=body, headers={"Content-Type": "application/json"}
        )
        assert_problem(answer, 422, "invalid_request")


def test_other_errors(several):
    x = np.zeros((1, 64), np.float32)
    answer = several.post("/v1/apply", json={"sets": ["small"], "inputs": x.tolist()})
    assert "'module' is missing" in assert_problem(answer, 422, "invalid_request")["detail"]
    answer = several.post("/v1/apply", json={"module": Q_PROJ, "inputs": x.tolist()})
    assert "'sets' is missing" in assert_problem(answer, 422, "invalid_request")["detail"]
    answer = several.post("/v1/apply", json={"module": Q_PROJ, "sets": ["small"]})
    assert_problem(answer, 422, "invalid_request")
    assert_problem(mixed_binary(several, ["small"], x, module="k_proj"), 404, "module_not_found")
    answer = several.post(
        "/v1/apply", content=safetensors.encode({"inputs": x}), headers={"Content-Type": BINARY}
    )
    assert_problem(answer, 422, "invalid_request")
    assert_problem(mixed(several, ["small"], x[:, :63]), 422, "shape_mismatch")
    several.post("/v1/sets", json={"name": "wide"})
    several.put(f"/v1/sets/wide/adapters/{Q_PROJ}", json={"d_in": 64, "d_out": 5})
    answer = mixed(several, ["small", "wide"], np.zeros((2, 64), np.float32))
    assert "sets for the same model" in assert_problem(answer, 422, "shape_mismatch")["detail"]


def test_dora_rows_in_a_mixed_batch(based, rng):
    upload(based, "dora", TINY / "dora")
    upload(based, "plain", TINY / "plain")
    golden = read_tensors(TINY / "dora" / "golden.safetensors")
    x = golden[f"{Q_PROJ}.x"]
    wx = (x.astype(float) @ BASE[f"{Q_PROJ}.weight"].astype(float).T).astype(np.float32)
    sets = ["dora", "plain"] + [None] * (len(x) - 2)
    metadata = {"module": Q_PROJ, "sets": json.dumps(sets)}
    body = safetensors.encode({"inputs": x, "base_outputs": wx}, metadata)
    got = decoded(based.post("/v1/apply", content=body, headers={"Content-Type": BINARY}))
    dora = golden[f"{Q_PROJ}.y"].astype(float) - wx
    assert reference.relative_error(got["outputs"][0], dora[0]) < 1e-5
    alone = based.post(f"/v1/sets/plain/adapters/{Q_PROJ}/apply", json={"inputs": x.tolist()})
    plain = np.array(alone.json()["outputs"])
    assert reference.relative_error(got["outputs"][1], plain[1]) < 1e-6
    assert not got["outputs"][2:].any()
    assert_problem(mixed(based, sets, x), 422, "dora_needs_base")
    for bad in ([["dora", "plain"], "plain"], [[{"set": "dora", "weight": 0.5}], "plain"]):
        metadata["sets"] = json.dumps([*bad, *sets[2:]])
        body = safetensors.encode({"inputs": x, "base_outputs": wx}, metadata)
        answer = based.post("/v1/apply", content=body, headers={"Content-Type": BINARY})
        assert_problem(answer, 422, "unsupported_adapter")


def test_a_module_of_width_zero(client):
    client.post("/v1/sets", json={"name": "z"})
    client.put("/v1/sets/z/adapters/m", json={"d_in": 0, "d_out": 3})
    body = {"module": "m", "sets": ["z"], "inputs": [[]]}
    assert client.post("/v1/apply", json=body).json()["outputs"] == [[0.0, 0.0, 0.0]]


def test_an_unknown_query_parameter_is_named(several):
    body = {"inputs": [0.0] * 64}
    answer = several.post(f"/v1/sets/small/adapters/{Q_PROJ}/apply?scael=2", json=body)
    assert "'scael'" in assert_problem(answer, 422, "invalid_request")["detail"]


def test_an_empty_mixed_batch(several):
    empty = mixed_binary(several, [], np.zeros((0, 64), np.float32))
    assert len(decoded(empty)["outputs"]) == 0
    one = mixed_binary(several, [None], np.zeros((1, 64), np.float32))
    assert_problem(one, 422, "invalid_request")  # one row of unknown width

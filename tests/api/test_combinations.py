"""Kinds of adapters, weights, stacks and places of rows in any combination, against float64.

A set is drawn as peft would save it: plain, rsLoRA, with patterns, DoRA, biases of lora_B,
embeddings, replaced modules and biases. Each test says first what the answer must be, by
tests/reference.py, and then asks.

Tolerances. u = 2^-24 is half of float32's spacing. A sum of n products in float32, in any order,
is within n u / (1 - n u) of the exact one, relative to the sum of the absolute values of its terms
(Higham 2002, section 3.1). `FEW` counts the roundings beside the sums: scalings, weights, ratios.
"""

import itertools
import json
import re
from dataclasses import replace

import httpx
import ml_dtypes
import numpy as np
import pytest
import reference
from conftest import assert_problem, serving, upload_parts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Lora, wide

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors
from bonsai_lora.settings import Settings

BINARY = {"Content-Type": "application/vnd.safetensors"}
U = 2.0**-24
FEW = 12
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]

LINEAR = {
    "model.layers.0.self_attn.q_proj": (8, 12),
    "model.layers.1.self_attn.q_proj": (8, 12),
    "model.layers.1.mlp.down_proj": (20, 8),
}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {**LINEAR, EMBEDDING: (11, 8), HEAD: (8, 11)}
"""(d_in, d_out) of each module of the base."""
NAMES = ("a", "b", "c")

relaxed = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)


only_float32 = pytest.mark.parametrize("service", [np.float32], indirect=True, ids=["float32"])
"""For what does not depend on the dtype of the base."""


@pytest.fixture(scope="module", params=DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def service(request, tmp_path_factory):
    """A client, and the tensors of the base `base`, in each dtype."""
    root, rng = tmp_path_factory.mktemp("combinations"), np.random.default_rng(5)
    base = {}
    for module, (d_in, d_out) in SHAPES.items():
        shape = (d_in, d_out) if module == EMBEDDING else (d_out, d_in)
        base[f"{module}.weight"] = rng.standard_normal(shape).astype(request.param)
        if module in LINEAR:
            base[f"{module}.bias"] = rng.standard_normal(d_out).astype(request.param)
    folder = root / "bases" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(safetensors.encode(base))
    (folder / "config.json").write_text('{"tie_word_embeddings": false}')
    app = create_app(Settings(store=str(root / "store"), bases=str(root / "bases")))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, base


class Drawn:
    """A PEFT adapter: its two files, and what they mean."""

    def __init__(self, config, tensors, loras, replaced):
        self.config, self.tensors = config, tensors
        self.loras = loras
        """Module -> Lora."""
        self.replaced = replaced
        """Parameter -> array."""

    @property
    def is_plain(self):
        """Whether one of its modules may be changed alone."""
        return not self.replaced and all(
            one.bias is None and one.magnitude is None and not one.is_embedding
            for one in self.loras.values()
        )


def patterned(pattern, module, default):
    """What peft takes from rank_pattern or alpha_pattern (get_pattern_key in tuners_utils.py)."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


@st.composite
def adapters(draw):
    """A PEFT adapter of any kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    variant = draw(st.sampled_from(["", "", "use_dora", "lora_bias"]))
    modules = draw(st.lists(st.sampled_from(list(LINEAR)), min_size=1, max_size=3, unique=True))
    if variant != "lora_bias" and draw(st.booleans()):
        modules.append(EMBEDDING)
    values = st.sampled_from([0.5, 1, 3, 8, 16])
    keys = st.sampled_from(["q_proj", "layers.1.self_attn.q_proj", r"layers\.\d\.mlp\.\w+", "^x"])
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": draw(st.integers(1, 6)),
        "lora_alpha": draw(values),
        "target_modules": sorted({one.rpartition(".")[2] for one in modules}),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(keys, st.integers(1, 6), max_size=2)),
        "alpha_pattern": draw(st.dictionaries(keys, values, max_size=2)),
        "bias": draw(st.sampled_from(["none", "none", "all", "lora_only"])),
        "modules_to_save": draw(st.sampled_from([None, None, [HEAD]])),
        **({variant: True} if variant else {}),
    }
    dtype = draw(st.sampled_from(DTYPES))
    tensors, loras, replaced = {}, {}, {}
    for module in modules:
        d_in, d_out = SHAPES[module]
        rank = patterned(config["rank_pattern"], module, config["r"])
        alpha = patterned(config["alpha_pattern"], module, config["lora_alpha"])
        scaling = alpha / (np.sqrt(rank) if config["use_rslora"] else rank)
        vectors = [None, None]
        for place, flag in enumerate(("lora_bias", "use_dora")):
            if config.get(flag):
                vectors[place] = rng.uniform(0.5, 2, d_out).astype(dtype)
        lora = Lora(
            rng.standard_normal((rank, d_in)).astype(dtype),
            rng.standard_normal((d_out, rank)).astype(dtype),
            float(scaling),
            *vectors,
            is_embedding=module == EMBEDDING,
        )
        loras[module] = lora
        start = f"base_model.model.{module}"
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if lora.is_embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors |= {f"{start}.{a}": lora.a, f"{start}.{b}": lora.b}
        if lora.bias is not None:
            tensors[f"{start}.lora_B.bias"] = lora.bias
        if lora.magnitude is not None:
            tensors[f"{start}.lora_magnitude_vector"] = lora.magnitude
        if config["bias"] != "none" and module in LINEAR and draw(st.booleans()):
            replaced[f"{module}.bias"] = rng.standard_normal(d_out).astype(dtype)
    if config["modules_to_save"] is not None:
        replaced[f"{HEAD}.weight"] = rng.standard_normal(SHAPES[HEAD][::-1]).astype(dtype)
    tensors |= {f"base_model.model.{name}": one for name, one in replaced.items()}
    return Drawn(config, tensors, loras, replaced)


def put(client, name, drawn):
    answer = upload_parts(client, name, drawn.config, drawn.tensors)
    assert answer.is_success, answer.text
    return answer.json()


WEIGHTS = st.sampled_from([1.0, 1.0, 0.5, -1.0, 2.0, 0.0])


def stacks(names):
    """Sets of one row with their weights: none, one, or several."""
    return st.lists(
        st.tuples(st.sampled_from(names), WEIGHTS), max_size=3, unique_by=lambda pair: pair[0]
    )


def refusal_of(module, rows, fleet, scale):
    """The code with which an apply must be refused, None if it must be answered."""
    for stack in rows:
        for name, _ in stack:
            if module not in fleet[name].loras:
                return "module_not_found"
    named = {name for stack in rows for name, _ in stack}
    if any(f"{module}.bias" in fleet[name].replaced for name in named):
        return "unsupported_adapter"
    for stack in rows:
        for name, weight in stack:
            if fleet[name].loras[module].magnitude is None:
                continue
            if len(stack) > 1 or weight * scale != 1.0:
                return "unsupported_adapter"
    return None


def expected_rows(module, rows, fleet, scale, x, weights):
    """What is added to each row, and how far an answer may be from that."""
    d_in, d_out = SHAPES[module]
    added, bound = np.zeros((len(x), d_out)), np.zeros((len(x), d_out))
    for row, stack in enumerate(rows):
        for name, weight in stack:
            lora, factor = fleet[name].loras[module], weight * scale
            added[row] += reference.adds(lora, x[row], factor, weights)
            size = lora.size() @ np.abs(wide(x[row]))
            if lora.bias is not None:
                size = size + np.abs(lora.scaling * wide(lora.bias))
            terms = d_in + len(lora.a) + FEW
            if lora.magnitude is not None:
                # (ratio - 1) W x + ratio D x, where the norm in the ratio has an error as V has.
                changed = wide(weights) + lora.delta()
                norms = np.linalg.norm(changed, axis=1)
                errors = np.linalg.norm(np.abs(wide(weights)) + lora.size(), axis=1) / norms
                ratio = wide(lora.magnitude) / norms
                size = (
                    (1 + ratio)
                    * (1 + errors)
                    * (size + np.abs(wide(weights)) @ np.abs(wide(x[row])))
                )
            bound[row] += max(abs(factor), 1e-9) * terms * U * size
    return added, bound


@only_float32
@given(data=st.data())
@relaxed
def test_a_mixed_batch(service, data):
    client, base = service
    fleet = {name: data.draw(adapters(), name) for name in NAMES[: data.draw(st.integers(1, 3))]}
    versions = {name: put(client, name, drawn)["version"] for name, drawn in fleet.items()}
    module = data.draw(st.sampled_from(list(LINEAR)))
    having = [name for name, drawn in fleet.items() if module in drawn.loras] or list(fleet)
    # Mostly of sets that have the module: the others are refused.
    one = st.one_of(stacks(having), stacks(having), stacks(list(fleet)))
    rows = data.draw(st.lists(one, min_size=1, max_size=6).filter(any), "rows")
    scale = data.draw(st.sampled_from([1.0, 1.0, 0.5]))
    d_in, d_out = SHAPES[module]
    rng = np.random.default_rng(len(rows))
    x = rng.standard_normal((len(rows), d_in)).astype(np.float32)
    weights = base[f"{module}.weight"]
    tensors = {"inputs": x}
    sets = [[{"set": name, "weight": weight} for name, weight in stack] for stack in rows]
    is_dora = any(
        getattr(fleet[name].loras.get(module), "magnitude", None) is not None
        for stack in rows
        for name, _ in stack
    )
    if is_dora:
        tensors["base_outputs"] = (wide(x) @ wide(weights).T).astype(np.float32)
    metadata = {"module": module, "sets": json.dumps(sets)}
    binary = client.post(
        f"/v1/apply?scale={scale}",
        content=safetensors.encode(tensors, metadata),
        headers=BINARY,
    )
    body = {"module": module, "sets": sets} | {name: one.tolist() for name, one in tensors.items()}
    as_json = client.post(f"/v1/apply?scale={scale}", json=body)
    code = refusal_of(module, rows, fleet, scale)
    if code is not None:
        for answer in (binary, as_json):
            assert_problem(answer, 404 if code == "module_not_found" else 422, code)
        return
    assert binary.status_code == 200, binary.text
    got, about = safetensors.decode(binary.content)
    named = {name for stack in rows for name, _ in stack}
    assert json.loads(about["versions"]) == {name: versions[name] for name in named}
    added, bound = expected_rows(module, rows, fleet, scale, x, weights)
    assert got["outputs"].shape == (len(rows), d_out)
    assert (np.abs(wide(got["outputs"]) - added) <= bound).all()
    assert np.array_equal(np.array(as_json.json()["outputs"], np.float32), got["outputs"])
    # A row is the same to the bit, whatever the other rows are, in whatever order.
    order = data.draw(st.permutations(range(len(rows))))
    turned = {name: one[list(order)] for name, one in tensors.items()}
    metadata["sets"] = json.dumps([sets[row] for row in order])
    again = client.post(
        f"/v1/apply?scale={scale}", content=safetensors.encode(turned, metadata), headers=BINARY
    )
    assert np.array_equal(
        safetensors.decode(again.content)[0]["outputs"], got["outputs"][list(order)]
    )


def merge_refusal(fleet, stack):
    """Whether a merged model cannot hold the sum of these sets at these weights."""
    touched, replaced = {}, {}
    for name, weight in stack:
        for module, lora in fleet[name].loras.items():
            touched.setdefault(f"{module}.weight", []).append((lora, weight))
        for parameter in fleet[name].replaced:
            if weight != 1.0 or parameter in replaced:
                return True
            replaced[parameter] = name
    for parameter, some in touched.items():
        is_dora = any(lora.magnitude is not None for lora, _ in some)
        alone = len(some) == 1 and parameter not in replaced
        if is_dora and not (alone and some[0][1] == 1.0):
            return True
    return False


def check_merged(client, base, fleet, stack):
    """The merged file of these sets at these weights is the reference's, or is refused."""
    (first, scale), *others = stack
    query = [("scale", scale)]
    for name, weight in others:
        query += [("set", name), ("weight", weight)]
    path = f"/v1/bases/base/merged/{first}/model.safetensors"
    answer = client.get(path, params=query)
    if merge_refusal(fleet, stack):
        assert_problem(answer, 422, "unsupported_adapter")
        return
    assert answer.status_code == 200, answer.text
    got, _ = safetensors.decode(answer.content)
    assert got.keys() == base.keys()
    for parameter, before in base.items():
        module, _, kind = parameter.rpartition(".")
        loras = [(fleet[n].loras[module], w) for n, w in stack if module in fleet[n].loras]
        replacement = next(
            (fleet[n].replaced[parameter] for n, _ in stack if parameter in fleet[n].replaced), None
        )
        after = got[parameter]
        assert after.dtype == before.dtype
        if kind == "bias":
            loras = [pair for pair in loras if pair[0].bias is not None]
        if not loras and replacement is None:
            assert after.tobytes() == before.tobytes(), parameter
            continue
        start = wide(before if replacement is None else replacement)
        if kind == "bias":
            exact = reference.merged_bias(before, loras, replacement)
            added = (np.abs(w * one.scaling * wide(one.bias)) for one, w in loras)
            bound = (len(loras) + FEW) * U * sum(added, np.abs(start))
        else:
            exact = reference.merged(before, loras, replacement)
            added = (abs(w) * (o.size().T if o.is_embedding else o.size()) for o, w in loras)
            bound = merge_bound(loras, start, exact, sum(added, np.abs(start)))
        assert_rounded_once(after, exact, bound)


@given(data=st.data())
@relaxed
def test_merged_files(service, data):
    client, base = service
    fleet = {name: data.draw(adapters(), name) for name in NAMES[: data.draw(st.integers(1, 3))]}
    for name, drawn in fleet.items():
        put(client, name, drawn)
    stack = [(name, data.draw(WEIGHTS, f"weight of {name}")) for name in fleet]
    check_merged(client, base, fleet, stack)


def merge_bound(loras, start, exact, size):
    """How far a sum in float32 may be from `exact`, before it is rounded to its dtype.

    `start` are the weights before; `size` is the sum of the absolute values of all terms.
    """
    bound = (sum(len(lora.a) for lora, _ in loras) + FEW) * U * size
    for lora, _ in loras:
        if lora.magnitude is not None:  # m V / |V|: the errors of V, and that of its norm
            axis = 0 if lora.is_embedding else 1
            changed = reference.merged(start, [(replace(lora, magnitude=None), 1.0)])
            norms = np.linalg.norm(changed, axis=axis, keepdims=True)
            of_norm = np.linalg.norm(bound, axis=axis, keepdims=True)
            ratio = np.expand_dims(wide(lora.magnitude), axis) / norms
            bound = ratio * bound + np.abs(exact) * (of_norm / norms + FEW * U)
    return bound


def assert_rounded_once(got, exact, bound):
    """`got` is `exact` with an error of at most `bound`, rounded to nearest in its own dtype."""
    info = ml_dtypes.finfo(got.dtype)
    spacing = np.maximum(np.abs(exact) + bound, float(info.tiny)) * float(info.eps)
    assert (np.abs(wide(got) - exact) <= bound + spacing / 2).all()


@given(data=st.data())
@relaxed
def test_weights_that_stream_by(service, data):
    """POST …/merge after an upload, and its reverse."""
    client, base = service
    drawn = data.draw(adapters())
    put(client, "a", drawn)
    module = data.draw(st.sampled_from(list(drawn.loras)))
    lora, before = drawn.loras[module], base[f"{module}.weight"]
    unmerge = data.draw(st.booleans())
    path = f"/v1/sets/a/adapters/{module}/merge?unmerge={unmerge}"
    answer = client.post(path, content=safetensors.encode({"weights": before}), headers=BINARY)
    is_dora = lora.magnitude is not None
    if (
        f"{module}.bias" in drawn.replaced
        or lora.bias is not None
        or (is_dora and (unmerge or lora.is_embedding))
    ):
        assert_problem(answer, 422, "unsupported_adapter")
        return
    assert answer.status_code == 200, answer.text
    loras = [(lora, -1.0 if unmerge else 1.0)]
    exact = reference.merged(before, loras)
    size = np.abs(wide(before)) + (lora.size().T if lora.is_embedding else lora.size())
    after = safetensors.decode(answer.content)[0]["weights"]
    assert after.dtype == before.dtype
    assert_rounded_once(after, exact, merge_bound(loras, wide(before), exact, size))


def modules_of(client, name):
    """What a set says of each module."""
    return {
        one["name"]: (one["rank"], one["scaling"], one["d_in"], one["d_out"])
        for one in client.get(f"/v1/sets/{name}").json()["modules"]
    }


def change(data, client, drawn):
    """Change a module of the set `a`, or take one out; return the answer."""
    module = data.draw(st.sampled_from([*drawn.loras, "y.self_attn.q_proj", "q_proj"]), "module")
    path = f"/v1/sets/a/adapters/{module}"
    how = data.draw(st.sampled_from(["delete", "weights", "new"]), "how")
    if how == "delete":
        return client.delete(path)
    if how == "new":
        config = {"rank": data.draw(st.integers(1, 5)), "alpha": data.draw(st.integers(1, 9))}
        return client.put(path, json={"d_in": 6, "d_out": 4, "config": config})
    rank = data.draw(st.integers(1, 6))
    rng = np.random.default_rng(rank)
    tensors = {
        "lora_A": rng.standard_normal((rank, 6)).astype(np.float32),
        "lora_B": rng.standard_normal((4, rank)).astype(np.float32),
    }
    alpha = data.draw(st.sampled_from(["", "?alpha=2", "?alpha=0.3"]))
    return client.put(path + alpha, content=safetensors.encode(tensors), headers=BINARY)


@only_float32
@given(data=st.data())
@relaxed
def test_an_export_is_the_set_whatever_was_changed(service, data):
    """What is exported and uploaded again has the same modules, scalings and tensors."""
    client, _ = service
    drawn = data.draw(adapters())
    put(client, "a", drawn)
    assert client.get("/v1/sets/a/adapter_config.json").json() == drawn.config
    changed, deleted = [], set()
    for _ in range(data.draw(st.integers(0, 3))):
        answer = change(data, client, drawn)
        if answer.request.method == "DELETE":
            is_there = answer.status_code == 204
            deleted.add(answer.request.url.path.rpartition("/")[2])  # with a bias that it replaces
            assert is_there or answer.json()["code"] == "module_not_found"
            changed += [answer.request.method] * is_there
        elif drawn.is_plain:
            assert answer.is_success, answer.text
            changed.append("PUT")
        elif answer.is_success:  # what was special was deleted, module by module
            assert all(name.removesuffix(".bias") in deleted for name in drawn.replaced)
            assert "DELETE" in changed
            changed.append("PUT")
        else:
            assert_problem(answer, 422, "unsupported_adapter")
    if not modules_of(client, "a"):
        return
    if set(changed) <= {"DELETE"}:
        assert client.get("/v1/sets/a/adapter_config.json").json() == drawn.config
    files = {
        part: client.get(f"/v1/sets/a/{part}{ending}").content
        for part, ending in (("adapter_config", ".json"), ("adapter_model", ".safetensors"))
    }
    answer = client.put("/v1/sets/b", files=files)
    assert answer.is_success, (answer.text, files["adapter_config"])
    assert modules_of(client, "b") == modules_of(client, "a")
    kept, _ = safetensors.decode(files["adapter_model"])
    again, _ = safetensors.decode(client.get("/v1/sets/b/adapter_model.safetensors").content)
    assert again.keys() == kept.keys()
    for name, one in kept.items():
        assert again[name].dtype == one.dtype
        assert again[name].tobytes() == one.tobytes()


def fixed(seed, module, replaced=(), **changes):
    """A set of rank 4 with float32 factors for one module, which replaces some parameters."""
    rng, (d_in, d_out) = np.random.default_rng(seed), SHAPES[module]
    a = rng.standard_normal((4, d_in)).astype(np.float32)
    b = rng.standard_normal((d_out, 4)).astype(np.float32)
    vector = rng.uniform(1, 2, d_out).astype(np.float32)
    bias = vector if changes.get("lora_bias") else None
    magnitude = vector if changes.get("use_dora") else None
    config = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 3}
    config |= {"target_modules": [module.rpartition(".")[2]], **changes}
    start = f"base_model.model.{module}"
    tensors = {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b}
    if magnitude is not None:
        tensors[f"{start}.lora_magnitude_vector"] = magnitude
    if bias is not None:
        tensors[f"{start}.lora_B.bias"] = bias
    others = {
        name: rng.standard_normal((11, 8) if name == f"{HEAD}.weight" else d_out).astype(np.float32)
        for name in replaced
    }
    tensors |= {f"base_model.model.{name}": one for name, one in others.items()}
    return Drawn(config, tensors, {module: Lora(a, b, 0.75, bias, magnitude)}, others)


Q_PROJ = "model.layers.0.self_attn.q_proj"


def apply_rows(client, x, sets, scale=1.0, **tensors):
    body = safetensors.encode(
        {"inputs": x, **tensors}, {"module": Q_PROJ, "sets": json.dumps(sets)}
    )
    return client.post(f"/v1/apply?scale={scale}", content=body, headers=BINARY)


@only_float32
def test_a_row_of_three_sets_is_the_same_to_the_bit_beside_any_others(service):
    client, _ = service
    for seed, name in enumerate(NAMES):
        put(client, name, fixed(seed, Q_PROJ))
    x = np.random.default_rng(1).standard_normal((12, 8)).astype(np.float32)
    alone = [apply_rows(client, row[None], [list(NAMES)]) for row in x]
    rows = np.concatenate([safetensors.decode(one.content)[0]["outputs"] for one in alone])
    for first in itertools.permutations(NAMES):
        for order in itertools.permutations(NAMES):
            sets = [first[0], first[1], first[2], *([list(order)] * 12)]
            answer = apply_rows(client, np.concatenate([x[:3], x]), sets)
            got = safetensors.decode(answer.content)[0]["outputs"][3:]
            assert np.array_equal(got, rows), (first, order)


@only_float32
@pytest.mark.parametrize("places", [(0,), (2,), (4,), (0, 1), (3, 4), (1, 3), (0, 2, 4)], ids=str)
def test_rows_of_dora_in_every_place(service, places):
    client, base = service
    dora, plain = fixed(1, Q_PROJ, use_dora=True), fixed(2, Q_PROJ)
    put(client, "a", plain)
    put(client, "b", dora)
    put(client, "c", fixed(3, Q_PROJ, use_dora=True))
    weights = base[f"{Q_PROJ}.weight"]
    x = np.random.default_rng(9).standard_normal((5, 8)).astype(np.float32)
    outputs = (wide(x) @ wide(weights).T).astype(np.float32)
    sets = ["b" if row in places else "a" for row in range(5)]
    fleet = {"a": plain, "b": dora}
    stacked = [[(name, 1.0)] for name in sets]
    added, bound = expected_rows(Q_PROJ, stacked, fleet, 1.0, x, weights)
    answer = apply_rows(client, x, sets, base_outputs=outputs)
    got = safetensors.decode(answer.content)[0]["outputs"]
    assert (np.abs(wide(got) - added) <= bound).all()

    def refused(entry, scale=1.0):
        changed = [entry if row == places[-1] else name for row, name in enumerate(sets)]
        answer = apply_rows(client, x, changed, scale, base_outputs=outputs)
        assert_problem(answer, 422, "unsupported_adapter")

    refused(["b", "a"])
    refused(["a", "b"])
    refused(["b", "c"])
    refused([{"set": "b", "weight": 0.5}])
    refused({"set": "b", "weight": 0})
    refused("b", scale=0.5)


FIXED = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "replaced head": {"replaced": [f"{HEAD}.weight"], "modules_to_save": [HEAD]},
    "replaced bias": {"replaced": [f"{Q_PROJ}.bias"], "bias": "lora_only"},
}


@pytest.mark.parametrize("kind", FIXED)
@pytest.mark.parametrize("other", FIXED)
def test_merged_files_of_two_sets_of_every_kind(service, kind, other):
    """For one module and for two, at every weight; alone, too."""
    client, base = service
    second = "model.layers.1.self_attn.q_proj"
    for module in (Q_PROJ, second):
        mine = fixed(1, Q_PROJ, **FIXED[kind])
        changes = FIXED[other] | {"bias": "all"} if other == "replaced bias" else FIXED[other]
        fleet = {"a": mine, "b": fixed(2, module, **changes)}
        for name, drawn in fleet.items():
            put(client, name, drawn)
        for weight in (1.0, 0.5):
            check_merged(client, base, fleet, [("a", weight)])
            for more in (1.0, -2.0):
                check_merged(client, base, fleet, [("a", weight), ("b", more)])

"""GGUF LoRA files over HTTP."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import gguf_files
import httpx
import numpy as np
import pytest
from conftest import (
    TINY,
    assert_problem,
    peft_config,
    peft_tensors,
    serving,
    upload,
    upload_parts,
)
from test_merged import write_base

from bonsai_lora.api.app import create_app
from bonsai_lora.api.merged_file import CountedFile
from bonsai_lora.checkpoints.gguf_lora import LoraFile, Model, encode_lora
from bonsai_lora.formats.gguf import read_header, reader_of
from bonsai_lora.formats.peft import GGUF_ARCHITECTURE, decode_adapter
from bonsai_lora.formats.peft_config import PeftConfig
from bonsai_lora.formats.peft_options import BaseOptions
from bonsai_lora.service.budget import Budget

PATH = "/v1/sets/plain/adapter.gguf"


def put(client, raw, path="/v1/sets/back"):
    return client.put(path, files={"adapter_gguf": raw})


def architecture(answer):
    assert answer.status_code == 200, answer.text
    return read_header(reader_of(answer.content), len(answer.content)).architecture


def deltas(client, name):
    return {
        one["name"]: one["delta_norm"]
        for one in client.get(f"/v1/sets/{name}/stats").json()["modules"]
    }


@pytest.mark.parametrize("adapter", ["plain", "rslora-patterns"])
def test_there_and_back_is_the_same_delta(based, adapter):
    upload(based, adapter, TINY / adapter)
    raw = based.get(f"/v1/sets/{adapter}/adapter.gguf").content
    answer = put(based, raw)
    assert answer.status_code == 201, answer.text
    assert answer.json()["origin"] == "gguf"
    assert answer.json()["warnings"] == answer.json()["ignored_keys"] == []
    found, expected = deltas(based, "back"), deltas(based, adapter)
    assert found == pytest.approx(expected, rel=1e-6)
    again = based.put("/v1/sets/named", files={"adapter.gguf": raw})
    assert again.status_code == 201


def test_ranges_tags_and_head(based):
    upload(based, "plain", TINY / "plain")
    whole = based.get(PATH)
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-type"] == "application/octet-stream"
    assert based.head(PATH).headers["content-length"] == str(len(whole.content))
    part = based.get(PATH, headers={"Range": "bytes=1000-9999", "If-Range": whole.headers["etag"]})
    assert part.status_code == 206
    assert part.content == whole.content[1000:10000]
    assert based.get(PATH, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304
    tags = {based.head(f"{PATH}?dtype={one}").headers["etag"] for one in ("F32", "F16", "Q8_0")}
    assert len(tags) == 3
    assert whole.headers["etag"] in tags


def test_the_architecture_must_be_known(client, rng):
    upload_parts(client, "plain", peft_config(), peft_tensors(rng))
    assert architecture(client.get(PATH)) == "qwen3"  # the default, as all modules are known in it
    assert architecture(client.get(f"{PATH}?architecture=qwen2")) == "qwen2"
    assert_problem(client.get(f"{PATH}?architecture=mamba"), 422, "invalid_request")
    layer = "model.layers.0.mixer"
    tensors = peft_tensors(rng, layer)
    upload_parts(client, "foreign", peft_config(target_modules=["mixer"]), tensors)
    answer = client.get("/v1/sets/foreign/adapter.gguf")
    assert_problem(answer, 422, "invalid_request")
    assert f"{layer!r} is unknown for the default architecture 'qwen3'" in answer.json()["detail"]
    assert_problem(client.get(f"{PATH}?folded=true"), 422, "unsupported_adapter")


def export_for(client, folder, config, tensors, target):
    """Export a set of `tensors` whose base is served, with this config.json."""
    write_base(folder / "bases" / "b", {"x": np.zeros(1, np.float32)}, **config)
    own = peft_config(base_model_name_or_path="org/b", target_modules=[target])
    assert upload_parts(client, "s", own, tensors).status_code == 201
    return client.get("/v1/sets/s/adapter.gguf")


def tensors_of(answer):
    """The F32 tensors of a GGUF file."""
    assert answer.status_code == 200, answer.text
    raw = answer.content
    found = read_header(reader_of(raw), len(raw)).tensors
    return {
        name: np.frombuffer(raw[one.start : one.stop], "<f4").reshape(one.shape)
        for name, one in found.items()
    }


QUERIES = "num_attention_heads"
KEYS = "num_key_value_heads"


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({QUERIES: 8, KEYS: 2}, {"q": 8, "k": 2}),
        ({QUERIES: 8}, {"q": 8, "k": 8}),
        ({QUERIES: 16, KEYS: 16, "text_config": {QUERIES: 8, KEYS: 2}}, {"q": 8, "k": 2}),
    ],
)
@pytest.mark.parametrize("kind", ["q", "k"])
def test_rows_are_in_the_order_of_the_heads_of_a_served_base(
    based, tmp_path, rng, config, heads, kind
):
    tensors = peft_tensors(rng, f"model.layers.0.self_attn.{kind}_proj", d_out=32)
    answer = export_for(based, tmp_path, {"model_type": "llama", **config}, tensors, f"{kind}_proj")
    b_matrix, width = [*tensors.values()][1], 32 // heads[kind]
    # llama.cpp, conversion of llama
    expected = b_matrix.reshape(heads[kind], 2, width // 2, 4).swapaxes(1, 2).reshape(32, 4)
    assert np.array_equal(tensors_of(answer)[f"blk.0.attn_{kind}.weight.lora_b"], expected)


def test_heads_that_are_no_numbers_are_refused(based, tmp_path, rng):
    config = {"model_type": "llama", QUERIES: "8"}
    tensors = peft_tensors(rng, "model.layers.0.self_attn.q_proj", d_out=32)
    answer = export_for(based, tmp_path, config, tensors, "q_proj")
    assert "head counts" in assert_problem(answer, 422, "unsupported_gguf")["detail"]


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 3,
}


def test_value_heads_are_in_the_order_of_a_served_base(based, tmp_path, rng):
    tensors = peft_tensors(rng, "model.layers.0.linear_attn.in_proj_qkv", d_out=32)
    config = {"model_type": "qwen3_5", "text_config": LINEAR}
    answer = export_for(based, tmp_path, config, tensors, "in_proj_qkv")
    b_matrix = [*tensors.values()][1]
    # Queries and keys have 2 * 3 rows each, and the other 20 are four value heads of five rows.
    values = b_matrix[12:].reshape(2, 2, 5, 4).swapaxes(0, 1).reshape(20, 4)
    stored = tensors_of(answer)["blk.0.attn_qkv.weight.lora_b"]
    assert np.array_equal(stored, np.concatenate([b_matrix[:12], values]))


@pytest.mark.parametrize("value", [None, "2", 0])
@pytest.mark.parametrize("key", [*LINEAR, "all"])
def test_linear_attention_without_its_head_counts_is_refused(based, tmp_path, rng, key, value):
    """transformers leaves out what has its default, and no order is as likely as any other."""
    text = {one: value if key in (one, "all") else count for one, count in LINEAR.items()}
    text = {one: count for one, count in text.items() if count is not None}
    tensors = peft_tensors(rng, "model.layers.0.linear_attn.in_proj_qkv", d_out=32)
    config = {"model_type": "qwen3_5", "text_config": text}
    answer = export_for(based, tmp_path, config, tensors, "in_proj_qkv")
    assert "head counts" in assert_problem(answer, 422, "unsupported_gguf")["detail"]


@pytest.mark.parametrize(
    ("config", "experts"),
    [({"num_experts": 5}, 5), ({"num_local_experts": 6}, 6), ({}, 3), ({"num_experts": -1}, 3)],
)
def test_a_stack_has_the_experts_of_a_served_base(based, tmp_path, rng, config, experts):
    """Of a base that does not say how many it has, those up to the last one with an adapter."""
    tensors = peft_tensors(rng, "model.layers.0.mlp.experts.2.up_proj")
    config = {"model_type": "qwen3_moe", **config}
    found = tensors_of(export_for(based, tmp_path, config, tensors, "up_proj"))
    assert found["blk.0.ffn_up_exps.weight.lora_a"].shape == (experts, 4, 6)


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_embedding_is_exported_if_a_served_base_has_a_head_of_its_own(
    based, tmp_path, rng, is_tied
):
    prefix = "base_model.model.model.embed_tokens.lora_embedding"
    tensors = {
        f"{prefix}_A": rng.standard_normal((4, 10)).astype(np.float32),
        f"{prefix}_B": rng.standard_normal((6, 4)).astype(np.float32),
    }
    answer = export_for(based, tmp_path, {"tie_word_embeddings": is_tied}, tensors, "embed_tokens")
    if is_tied:
        assert_problem(answer, 422, "unsupported_adapter")
    else:
        assert tensors_of(answer)["token_embd.weight.lora_a"].shape == (10, 4)


@pytest.mark.parametrize("own", ["bloom", 7])
def test_an_uploaded_configuration_names_no_unknown_architecture(client, rng, own):
    config = peft_config(**{GGUF_ARCHITECTURE: own})
    upload_parts(client, "plain", config, peft_tensors(rng))
    assert architecture(client.get(PATH)) == "qwen3"


def test_a_set_keeps_the_architecture_and_base_of_its_file(client, rng):
    upload_parts(
        client, "plain", peft_config(base_model_name_or_path="acme/tiny"), peft_tensors(rng)
    )
    raw = client.get(f"{PATH}?architecture=qwen2").content
    assert put(client, raw).json()["base_model_name"] == "acme/tiny"
    back = "/v1/sets/back/adapter.gguf"
    assert architecture(client.get(back)) == "qwen2"
    client.patch("/v1/sets/back", json={"base_model_name": "b"})
    assert architecture(client.get(back)) == "qwen2"
    assert architecture(client.get(f"{back}?architecture=qwen3")) == "qwen3"
    assert "gguf_architecture" not in client.get("/v1/sets/back/adapter_config.json").json()
    assert put(client, raw, "/v1/sets/other?architecture=qwen3").status_code == 201
    assert architecture(client.get("/v1/sets/other/adapter.gguf")) == "qwen3"


@pytest.mark.parametrize(
    ("limits", "code"),
    [({"max_modules": 100}, "too_many_modules"), ({"work_memory_bytes": 4096}, "")],
)
def test_experts_are_counted_before_they_are_made(settings, limits, code):
    """A thousand experts of a few bytes each, and values that take four times their space."""
    kind, size = ("F16", 2000) if code else ("Q8_0", 34 * 1000)
    shape = (1000, 1, 1) if code else (1000, 1, 32)
    pairs = {"general.architecture": "qwen3moe", "general.type": "adapter", "adapter.type": "lora"}
    name = "blk.0.ffn_up_exps.weight"
    tensors = {
        f"{name}.lora_a": (kind, shape, bytes(size)),
        # NaN, for which the values would be refused if they were read first.
        f"{name}.lora_b": ("F16", (1000, 1, 1), b"\xff\x7e" * 1000),
    }
    raw = gguf_files.file_of(pairs, tensors)
    app = create_app(settings.model_copy(update=limits))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        answer = put(client, raw)
        assert_problem(answer, 422 if code else 507, code or "memory_budget_exceeded")
        assert_problem(client.get("/v1/sets/back"), 404, "set_not_found")


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_what_writing_takes_is_counted_before(settings, rng, dtype):
    app = create_app(settings.model_copy(update={"work_memory_bytes": 1 << 16}))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        upload_parts(client, "plain", peft_config(), peft_tensors(rng, d_in=1000))
        answer = client.get(f"{PATH}?dtype={dtype}")
        assert_problem(answer, 507, "memory_budget_exceeded")
        upload_parts(client, "plain", peft_config(), peft_tensors(rng, d_in=500))
        for _ in range(3):  # what was reserved is released
            assert client.get(f"{PATH}?dtype={dtype}").status_code == 200


def test_values_are_checked_once(client, rng, monkeypatch):
    """A download in many ranges must not compute all values for each of them."""
    checked = []
    check = LoraFile.check_values
    monkeypatch.setattr(
        LoraFile, "check_values", lambda one: (checked.append(one.etag), check(one))
    )
    upload_parts(client, "plain", peft_config(use_rslora=True), peft_tensors(rng))
    whole = client.get(f"{PATH}?dtype=F16").content
    for start in range(0, len(whole), 4000):
        part = client.get(f"{PATH}?dtype=F16", headers={"Range": f"bytes={start}-{start + 3999}"})
        assert part.content == whole[start : start + 4000]
    assert len(checked) == 1
    client.get(f"{PATH}?dtype=Q8_0")
    upload_parts(client, "plain", peft_config(use_rslora=True), peft_tensors(rng))
    client.get(f"{PATH}?dtype=F16")
    assert len({*checked}) == len(checked) == 3


def test_values_that_do_not_fit_are_refused_each_time(client, rng):
    tensors = peft_tensors(rng)
    upload_parts(client, "plain", peft_config(), {name: one * 1e5 for name, one in tensors.items()})
    for _ in range(2):
        detail = assert_problem(client.get(f"{PATH}?dtype=F16"), 422, "unsupported_adapter")[
            "detail"
        ]
        assert "beyond the largest F16 value" in detail
        assert client.get(PATH).status_code == 200


def test_memory_is_reserved_while_a_file_is_read(rng):
    lora_set = decode_adapter(PeftConfig(peft_config()), peft_tensors(rng), "s").lora_set
    made = encode_lora(lora_set, BaseOptions.of(None), Model("qwen3"), "F32", '"tag"')
    memory = Budget(made.working_bytes)

    async def read():
        blocks = CountedFile(made, executor, memory, made.working_bytes).read(0, made.size_bytes)
        await anext(blocks)
        held = memory.reserved_bytes
        await blocks.aclose()
        return held

    with ThreadPoolExecutor(1) as executor:
        assert asyncio.run(read()) == made.working_bytes
    assert memory.reserved_bytes == 0


def test_refused_uploads_change_nothing(client, rng):
    upload_parts(client, "plain", peft_config(), peft_tensors(rng))
    raw = client.get(f"{PATH}?architecture=qwen3").content
    model = gguf_files.file_of(
        {"general.architecture": "qwen3"}, {"a": ("F32", (1,), np.zeros(1, "<f4").tobytes())}
    )
    assert_problem(put(client, model), 422, "unsupported_adapter")
    assert "is a model" in put(client, model).json()["detail"]
    assert_problem(put(client, raw[:-64]), 400, "malformed_gguf")
    assert_problem(put(client, b""), 400, "malformed_gguf")
    two = {"adapter_gguf": raw, "adapter_config": b"{}"}
    assert_problem(client.put("/v1/sets/back", files=two), 400, "malformed_multipart")
    assert_problem(client.get("/v1/sets/back"), 404, "set_not_found")


def test_dora_is_refused(based):
    upload(based, "dora", TINY / "dora")
    answer = based.get("/v1/sets/dora/adapter.gguf")
    assert_problem(answer, 422, "unsupported_adapter")
    assert "DoRA" in answer.json()["detail"]

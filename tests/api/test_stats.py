import numpy as np
import pytest
from conftest import TINY, assert_problem, read_tensors, upload


def test_set_stats(client):
    upload(client, "plain", TINY / "plain")
    stats = client.get("/v1/sets/plain/stats", params={"base_param_count": 127_424}).json()
    info = client.get("/v1/sets/plain").json()
    assert stats["adapter_count"] == 14
    assert stats["total_trainable_params"] == info["total_trainable_params"] == 20_992
    assert stats["total_memory_bytes"] == 83_968
    assert stats["base_param_count"] == 127_424
    assert stats["efficiency_ratio"] == pytest.approx(20_992 / 127_424)
    tensors = read_tensors(TINY / "plain" / "adapter_model.safetensors")
    for module in stats["modules"]:
        key = f"base_model.model.{module['name']}.lora_"
        delta = 2.0 * tensors[f"{key}B.weight"].astype(float) @ tensors[f"{key}A.weight"]
        values = np.linalg.svd(delta, compute_uv=False)
        assert module["delta_norm"] == pytest.approx(np.linalg.norm(values))
        assert 1 <= module["effective_rank"] <= module["rank"] == 8


def test_ratio_edge_cases(client):
    client.post("/v1/sets", json={"name": "s"})
    assert client.get("/v1/sets/s/stats").json()["efficiency_ratio"] is None
    zero = client.get("/v1/sets/s/stats?base_param_count=0").json()
    assert (zero["efficiency_ratio"], zero["base_param_count"]) == (0.0, 0)
    for wrong in ("-1", "x", str(2**64)):
        refused = client.get(f"/v1/sets/s/stats?base_param_count={wrong}")
        assert_problem(refused, 422, "invalid_request")


def test_store_stats(client):
    assert client.get("/v1/stats").json()["set_count"] == 0
    for name, rank in [("small", 1), ("large", 3), ("middle", 2)]:
        body = {
            "name": name,
            "config": {"rank": rank},
            "mlp": {"hidden_size": 8, "intermediate_size": 4},
        }
        client.post("/v1/sets", json=body)
    stats = client.get("/v1/stats").json()
    assert (stats["set_count"], stats["adapter_count"]) == (3, 9)
    assert stats["total_trainable_params"] == 6 * 3 * 12
    assert stats["total_memory_bytes"] == 4 * stats["total_trainable_params"]
    assert [one["name"] for one in stats["sets"]] == ["large", "middle", "small"]
    assert stats["uptime_seconds"] >= 0
    assert stats["memory_budget_bytes"] > 0


@pytest.mark.parametrize(
    ("query", "adapters", "size"),
    [
        ("d_in=64&d_out=128&rank=8&budget_bytes=30720", 5, 6144),
        ("d_in=64&d_out=128&rank=8&budget_bytes=6143", 0, 6144),
        ("d_in=64&d_out=128&rank=8&budget_bytes=0", 0, 6144),
        ("d_in=0&d_out=0&rank=0&budget_bytes=1000000", 0, 0),
        ("d_in=64&d_out=128&rank=0&budget_bytes=1000000", 0, 0),
    ],
)
def test_estimate(client, query, adapters, size):
    answer = client.get(f"/v1/estimate?{query}")
    assert answer.json() == {"adapters": adapters, "bytes_per_adapter": size}


def test_estimate_needs_every_number(client):
    assert_problem(client.get("/v1/estimate?d_in=1"), 422, "invalid_request")
    assert_problem(
        client.get("/v1/estimate?d_in=-1&d_out=1&rank=1&budget_bytes=1"), 422, "invalid_request"
    )

"""The nine tests of the reference module, each with its counterpart."""

import numpy as np
import pytest

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry


def config(rank):
    return LoraConfig(rank=rank, alpha=float(rank), dropout=0.0, target_modules=())


def test_apply_with_zero_b_gives_zeros():
    out = LoraAdapter.new(8, 16, config(4)).apply(np.ones(8, np.float32))
    assert out.shape == (16,)
    assert not out.any()


def test_param_count():
    assert LoraAdapter.new(64, 128, config(8)).param_count() == 64 * 8 + 8 * 128


def test_memory_bytes():
    adapter = LoraAdapter.new(64, 128, config(8))
    assert adapter.memory_bytes() == adapter.param_count() * 4


def test_registry_add_and_get():
    registry = LoraRegistry(config(4)).add("q_proj", LoraAdapter.new(32, 64, config(4)))
    assert registry.adapter_count() == 1
    assert registry.get("q_proj") is not None
    assert registry.get("v_proj") is None
    assert not registry.is_empty()
    assert "q_proj" in registry.module_names()


def test_registry_apply_adapter():
    registry = LoraRegistry(config(4)).add("q_proj", LoraAdapter.new(8, 16, config(4)))
    x = np.full(8, 0.5, np.float32)
    assert registry.apply_adapter("q_proj", x).shape == (16,)
    assert registry.apply_adapter("missing", x) is None


def test_set_creates_adapters():
    lora_set = BonsaiLoraSet.new(config(8), "bonsai-8b", "my-adapter")
    lora_set = lora_set.add_attention_adapters(256, 8).add_mlp_adapters(256, 512)
    assert lora_set.registry.adapter_count() == 7
    assert lora_set.base_model_name == "bonsai-8b"
    assert lora_set.adapter_name == "my-adapter"


def test_merge_with_zero_b_changes_nothing():
    weights = np.ones((4, 4), np.float32)
    LoraAdapter.new(4, 4, config(4)).merge_into_weights(weights)
    assert (weights == 1).all()


def test_efficiency_ratio():
    lora_set = BonsaiLoraSet.new(config(8), "bonsai-8b", "test").add_attention_adapters(256, 8)
    ratio = lora_set.efficiency_ratio(8_000_000_000)
    assert 0 < ratio < 0.01
    assert ratio == pytest.approx(lora_set.total_trainable_params() / 8e9)
    assert lora_set.efficiency_ratio(0) == 0.0


def test_estimate_adapters_for_budget():
    bytes_each = (64 * 8 + 8 * 128) * 4
    estimate = LoraRegistry.estimate_adapters_for_budget
    assert estimate(64, 128, 8, bytes_each * 5) == 5
    assert estimate(64, 128, 8, bytes_each * 6 - 1) == 5
    assert estimate(64, 128, 8, bytes_each - 1) == 0
    assert estimate(64, 128, 8, 0) == 0
    assert estimate(0, 0, 0, 1_000_000) == 0

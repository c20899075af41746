"""Adapters as people save them: the corpus in tests/data/adapters, and what comes of each."""

import json

import numpy as np
import pytest
from conftest import DATA

from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.formats.peft import decode_adapter, set_tensors
from bonsai_lora.formats.peft_config import PeftConfig, parse_config
from bonsai_lora.formats.peft_keys import group_keys

CASES = json.loads((DATA / "adapters" / "cases.json").read_text())
# As peft 0.21 writes one.
CONFIG = {
    "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
    "auto_mapping": None, "base_model_name_or_path": "Qwen/Qwen3-0.6B", "bias": "none",
    "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
    "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None,
    "layers_to_transform": None, "loftq_config": {}, "lora_alpha": 16, "lora_bias": False,
    "lora_dropout": 0.05, "megatron_config": None, "megatron_core": "megatron.core",
    "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2",
    "qalora_group_size": 16, "r": 8, "rank_pattern": {}, "revision": None,
    "target_modules": ["v_proj", "q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False,
    "use_qalora": False, "use_rslora": False,
}  # fmt: skip


def config_of(case):
    """The bytes of the case's adapter_config.json."""
    config = {**CONFIG, **case["config"]}
    has_mark = config.pop("<bom>", False)
    kept = {name: value for name, value in config.items() if name not in case.get("omit", [])}
    text = json.dumps(kept, ensure_ascii=False).replace('"<NaN>"', "NaN")
    return (b"\xef\xbb\xbf" if has_mark else b"") + text.encode()


def tensors_of(case, rng):
    return {
        key.replace("{i}", str(layer)): rng.standard_normal(shape).astype(np.float32)
        for key, shape in case["keys"].items()
        for layer in range(case["layers"] if "{i}" in key else 1)
    }


def test_the_corpus_is_there():
    assert len(CASES) >= 60
    assert len({case["name"] for case in CASES}) == len(CASES)
    assert all("#" in case["source"] for case in CASES)
    assert 20 < sum("code" in case["expect"] for case in CASES) < len(CASES) - 20


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_case(rng, case):
    expect = case["expect"]
    tensors = tensors_of(case, rng)
    if "code" in expect:
        with pytest.raises(BonsaiLoraError) as caught:
            decode_adapter(PeftConfig(parse_config(config_of(case))), tensors, "s")
        assert caught.value.code == expect["code"]
        assert expect["says"] in caught.value.detail
        return
    found = decode_adapter(PeftConfig(parse_config(config_of(case))), tensors, "s")
    adapters = found.lora_set.registry.adapters
    assert len(adapters) == expect["modules"]
    assert len(found.lora_set.replacements) == expect.get("replaced", 0)
    assert len(found.ignored_keys) == expect.get("ignored", 0)
    if "scaling" in expect:
        assert {one.scaling for one in adapters.values()} == {expect["scaling"]}
    for module, scaling in expect.get("scalings", {}).items():
        assert adapters[module].scaling == scaling
    if "warning" in expect:
        assert any(expect["warning"] in warning for warning in found.warnings), found.warnings
    else:
        assert found.warnings == []
    check_export(found, tensors)


def check_export(found, tensors):
    """Every tensor but the ignored ones is exported as it came, under a name that reads back."""
    exported = set_tensors(found.lora_set)
    assert len(exported) == len(tensors) - len(found.ignored_keys)
    for key, name in found.names.items():
        assert exported[name] is tensors[key]
    modules, parameters = group_keys(exported)
    assert modules.keys() == found.lora_set.registry.adapters.keys()
    assert parameters.keys() == found.lora_set.replacements.keys()

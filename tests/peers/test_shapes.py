"""The shapes of known models, against the modules of transformers' classes."""

import pytest

from bonsai_lora.core.shapes import MODELS

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", MODELS)
def test_modules_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = MODELS[name]
    sizes = {
        "hidden_size": model.attention.hidden_size, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.attention.num_heads, "head_dim": model.attention.head_dim,
        "num_key_value_heads": model.attention.num_kv_heads,
        "intermediate_size": model.mlp.intermediate_size, "vocab_size": 8,
    }  # fmt: skip
    if model.linear_attention is None:
        config = transformers.Qwen3Config(**sizes)
    else:
        values = model.linear_attention.value_heads
        config = transformers.Qwen3_5TextConfig(**sizes, linear_num_value_heads=values)
    with torch.device("meta"):
        made = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {
        name: (one.in_features, one.out_features)
        for name, one in made.named_modules()
        if isinstance(one, torch.nn.Linear) and name != "lm_head"
    }
    assert model.modules() == theirs

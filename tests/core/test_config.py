import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import InvalidRequestError


def test_defaults_are_the_references():
    config = LoraConfig()
    assert (config.rank, config.alpha, config.dropout) == (8, 8.0, 0.0)
    assert config.target_modules == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


@given(
    st.integers(0, 1 << 20),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(0, 0.9),
    st.lists(st.text()),
)
def test_json_round_trip(rank, alpha, dropout, modules):
    config = LoraConfig(rank, alpha, dropout, tuple(modules))
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_alpha_is_kept_as_float32_and_prints_short():
    assert LoraConfig(alpha=0.1).to_dict()["alpha"] == 0.1
    assert LoraConfig(alpha=1 / 3).alpha == 0.33333334


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", -1),
        ("alpha", float("nan")),
        ("alpha", 1e39),
        ("alpha", 10**400),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", float("nan")),
        ("target_modules", "q_proj"),
    ],
)
def test_wrong_values_are_refused(field, value):
    with pytest.raises(InvalidRequestError) as caught:
        LoraConfig(**{field: value})
    assert caught.value.detail.startswith(f"{field} is {value!r}; expected ")
    assert caught.value.values == {"field": field}


def test_targets():
    config = LoraConfig(target_modules=("q_proj", "layers.1.mlp.up_proj"))
    assert config.targets("q_proj")
    assert config.targets("model.layers.0.self_attn.q_proj")
    assert config.targets("model.layers.1.mlp.up_proj")
    assert not config.targets("model.layers.11.mlp.up_proj")
    assert not config.targets("my_q_proj")
    assert LoraConfig(target_modules=()).targets("anything")

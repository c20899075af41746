"""Whether a base stores a weight as (out, in) or (in, out), from its model type, names and shapes."""

import numpy as np
import pytest

from bonsai_lora.checkpoints.orientation import as_stored, is_any_transposed
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.errors import UnsupportedAdapterError

LINEAR, CONV1D, UNKNOWN = "linear", "conv1d", None
IN, OUT = 3, 5


def adapter_of(d_in, d_out, experts=None, layer="linear"):
    rows = 2 * (experts or 1)
    a_matrix, b_matrix = np.ones((rows, d_in), np.float32), np.ones((d_out, rows), np.float32)
    config = LoraConfig(rank=2, alpha=2.0)
    return LoraAdapter(config, a_matrix, b_matrix, 1.0, layer=layer, experts=experts)


@pytest.mark.parametrize(
    ("model_type", "module", "d_in", "d_out", "shape", "fan_in_fan_out", "others", "layer"),
    [
        # A model type of Conv1D layers decides by name, whatever the adapter says.
        ("gpt2", "h.0.attn.c_proj", IN, IN, (IN, IN), False, None, CONV1D),
        ("gpt2", "h.0.attn.c_proj", IN, IN, (IN, IN), True, False, CONV1D),
        ("gpt2", "lm_head", IN, OUT, (OUT, IN), True, True, LINEAR),
        # Without fan_in_fan_out every layer of other types is linear.
        ("llama", "layers.0.c_proj", IN, IN, (IN, IN), False, True, LINEAR),
        ("", "h.0.attn.c_proj", IN, OUT, (IN, OUT), False, None, LINEAR),
        # With it, the shape decides if it can,
        ("", "h.0.any", IN, OUT, (IN, OUT), True, None, CONV1D),
        ("", "h.0.any", IN, OUT, (OUT, IN), True, True, LINEAR),
        # then the shapes of the others, for names of Conv1D layers,
        ("", "h.0.attn.c_proj", IN, IN, (IN, IN), True, True, CONV1D),
        ("", "h.0.attn.c_proj", IN, IN, (IN, IN), True, False, LINEAR),
        ("", "h.0.any", IN, IN, (IN, IN), True, True, LINEAR),
        # then the name, if the type is known; nothing else is guessed.
        ("llama", "layers.0.q_proj", IN, IN, (IN, IN), True, None, LINEAR),
        ("llama", "layers.0.c_proj", IN, IN, (IN, IN), True, None, UNKNOWN),
        ("", "layers.0.q_proj", IN, IN, (IN, IN), True, None, UNKNOWN),
    ],
)
def test_one_weight(model_type, module, d_in, d_out, shape, fan_in_fan_out, others, layer):
    fit = (module, adapter_of(d_in, d_out), shape)

    def stored():
        return as_stored(fit, model_type, may_be_transposed=fan_in_fan_out, others_are=others)

    if layer is not UNKNOWN:
        assert stored().layer == layer
        return
    with pytest.raises(UnsupportedAdapterError) as caught:
        stored()
    assert caught.value.values == {"module": module, "field": "fan_in_fan_out"}


@pytest.mark.parametrize(
    ("model_type", "d_in", "d_out", "shape", "layer"),
    [
        ("gpt_oss", IN, IN, (2, IN, IN), CONV1D),
        ("qwen3_moe", IN, IN, (2, IN, IN), LINEAR),
        ("gpt_oss", IN, OUT, (2, IN, OUT), CONV1D),
        ("gpt_oss", IN, OUT, (2, OUT, IN), LINEAR),
        ("qwen3_moe", IN, OUT, (2, IN, OUT), CONV1D),
    ],
)
def test_fused_experts_go_by_their_shape_and_square_ones_by_the_model_type(
    model_type, d_in, d_out, shape, layer
):
    fit = ("experts.gate_up_proj", adapter_of(d_in, d_out, experts=2), shape)
    stored = as_stored(fit, model_type, may_be_transposed=False, others_are=None)
    assert stored.layer == layer
    assert stored.a_matrix is fit[1].a_matrix


def test_embeddings_are_what_they_are():
    fit = ("wte", adapter_of(IN, OUT, layer="embedding"), (IN, OUT))
    assert as_stored(fit, "gpt2", may_be_transposed=True, others_are=True) is fit[1]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(IN, OUT)], True),
        ([(OUT, IN)], False),
        ([(IN, OUT), (OUT, IN)], None),
        ([(IN, OUT), (7, 7)], True),
        ([(7, 7)], None),
        ([], None),
    ],
)
def test_others_decide_if_they_agree(shapes, expected):
    fits = [("m", adapter_of(IN, OUT), shape) for shape in shapes]
    square = ("m", adapter_of(IN, IN), (IN, IN))
    embedding = ("m", adapter_of(IN, OUT, layer="embedding"), (OUT, IN))
    assert is_any_transposed([*fits, square, embedding]) == expected

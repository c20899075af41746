"""Fused experts merged into a base that stacks them, as (experts, d_out, d_in), or does not."""

import numpy as np
import pytest
from test_merged_kinds import CONFIG, close, lora_set, normal

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import merged_files
from bonsai_lora.checkpoints.merged_tensor import MergedTensor, Touched
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.errors import ShapeMismatchError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.peft_options import BaseOptions

EXPERTS, D_OUT, D_IN = 3, 4, 5
PARAMETER = "layers.0.mlp.experts.down_proj"


@pytest.fixture
def adapter(rng):
    a_matrix, b_matrix = normal(rng, EXPERTS * 2, D_IN), normal(rng, D_OUT, 2 * EXPERTS)
    return LoraAdapter(CONFIG, a_matrix, b_matrix, 2.0, experts=EXPERTS)


@pytest.fixture
def open_base(tmp_path, rng):
    def open_with(*names, shape=(EXPERTS, D_OUT, D_IN)):
        (tmp_path / "b").mkdir()
        tensors = {name: normal(rng, *shape) for name in names}
        (tmp_path / "b" / "model.safetensors").write_bytes(safetensors.encode(tensors))
        return BaseFolder(tmp_path).get("b"), tensors

    return open_with


def delta_of(adapter):
    """All experts' deltas in float64, (experts * d_out, d_in)."""
    a_matrix = adapter.a_matrix.astype(np.float64).reshape(EXPERTS, 2, D_IN)
    b_matrix = adapter.b_matrix.astype(np.float64).reshape(D_OUT, 2, EXPERTS)
    return 2.0 * np.einsum("oqe,eqi->eoi", b_matrix, a_matrix).reshape(-1, D_IN)


def merge(base, adapter, leaf, match=None):
    """The tensors of `base` with an adapter of the fused parameter `leaf`."""
    options = BaseOptions(target_parameters=(f"mlp.experts.{leaf}",))
    one = Ingredient(lora_set({"layers.0.mlp.experts": adapter}), '"x-1"', 1.0, options)
    file = merged_files(MergedModel(base, [one], match))["model.safetensors"]
    raw = b"".join(piece() for piece in file.pieces(0, file.size_bytes))
    return safetensors.decode(raw)[0]


@pytest.mark.parametrize("stop", range(1, EXPERTS * D_OUT + 1))
def test_blocks_may_begin_and_end_within_an_expert(open_base, adapter, stop):
    base, tensors = open_base(PARAMETER)
    tensor = MergedTensor(base.tensor(PARAMETER), Touched([(adapter, 0.5)]))
    expected = tensors[PARAMETER].reshape(-1, D_IN) + 0.5 * delta_of(adapter)
    for start in range(stop):
        # A block is whole rows, or a part of one.
        for columns in [slice(0, D_IN)] + [slice(1, 3)] * (stop - start == 1):
            got = tensor[slice(start, stop), columns]
            assert close(got, expected[start:stop, columns])


def test_match_chooses_between_towers(open_base, adapter):
    towers = [f"{tower}.model.{PARAMETER}" for tower in ("audio", "text")]
    base, tensors = open_base(*towers)
    got = merge(base, adapter, "down_proj", "text.")
    assert np.array_equal(got[towers[0]], tensors[towers[0]])
    expected = tensors[towers[1]].reshape(-1, D_IN) + delta_of(adapter)
    assert close(got[towers[1]].reshape(-1, D_IN), expected)


def separate(tower, count):
    return [f"{tower}.model.layers.0.mlp.experts.{one}.down_proj.weight" for one in range(count)]


def test_match_chooses_between_towers_of_separate_experts(open_base, adapter):
    names = separate("text", EXPERTS)
    base, tensors = open_base(*separate("audio", EXPERTS + 1), *names, shape=(D_OUT, D_IN))
    got = merge(base, adapter, "down_proj", "text.")
    deltas = dict(zip(names, delta_of(adapter).reshape(EXPERTS, D_OUT, D_IN), strict=True))
    for name, before in tensors.items():
        assert close(got[name], before + deltas.get(name, 0))


def test_a_base_may_have_one_expert(open_base, rng):
    (name,) = separate("text", 1)
    base, tensors = open_base(name, shape=(D_OUT, D_IN))
    one = LoraAdapter(CONFIG, normal(rng, 2, D_IN), normal(rng, D_OUT, 2), 2.0, experts=1)
    delta = 2.0 * one.b_matrix.astype(float) @ one.a_matrix
    assert close(merge(base, one, "down_proj")[name], tensors[name] + delta)


@pytest.mark.parametrize(("count", "words"), [(2, "has no expert 2"), (4, "has an expert 3")])
def test_a_different_number_of_experts_is_refused(open_base, adapter, count, words):
    base, _ = open_base(*separate("text", count), shape=(D_OUT, D_IN))
    with pytest.raises(ShapeMismatchError, match=f"3 experts .* base 'b' {words}") as caught:
        merge(base, adapter, "down_proj")
    assert caught.value.values == {"module": "layers.0.mlp.experts", "base": "b"}


@pytest.mark.parametrize(("leaf", "names"), [("down_proj", ["w2"]), ("gate_up_proj", ["w1", "w3"])])
def test_separate_experts_may_have_the_names_of_mixtral(open_base, adapter, leaf, names):
    path = "model.layers.0.block_sparse_moe.experts"
    experts = [f"{path}.{number}.{name}.weight" for number in range(EXPERTS) for name in names]
    base, tensors = open_base(*experts, shape=(D_OUT // len(names), D_IN))
    got = merge(base, adapter, leaf)
    deltas = delta_of(adapter).reshape(len(experts), -1, D_IN)
    for name, delta in zip(experts, deltas, strict=True):
        assert close(got[name], tensors[name] + delta)

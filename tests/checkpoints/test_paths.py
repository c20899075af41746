"""One path, one tensor: what a path in an adapter means in a base."""

import pytest

from bonsai_lora.checkpoints.paths import TensorPaths, prefixes_of
from bonsai_lora.errors import InvalidRequestError

LEAF = "layers.0.self_attn.q_proj.weight"


def paths(*names, model_type="qwen3"):
    return TensorPaths("b", names, prefixes_of(model_type))


@pytest.mark.parametrize(
    ("names", "asked", "meant"),
    [
        # The exact name comes first, whatever else ends so.
        ([LEAF, f"model.{LEAF}", f"mtp.{LEAF}"], LEAF, LEAF),
        # Trained on the bare model, saved from the causal class, and the other way round.
        ([f"model.{LEAF}", f"mtp.{LEAF}"], LEAF, f"model.{LEAF}"),
        ([LEAF, f"mtp.{LEAF}"], f"model.{LEAF}", LEAF),
        # A text model's adapter beside a vision tower, old names and new.
        (
            [f"language_model.model.{LEAF}", f"vision_tower.model.{LEAF}"],
            f"model.{LEAF}",
            f"language_model.model.{LEAF}",
        ),
        (
            [f"model.language_model.{LEAF}", f"model.visual.{LEAF}"],
            LEAF,
            f"model.language_model.{LEAF}",
        ),
        (
            [f"language_model.model.{LEAF}"],
            f"model.language_model.{LEAF}",
            f"language_model.model.{LEAF}",
        ),
        # An unknown prefix; no other name has this end.
        ([f"thinker.{LEAF}"], LEAF, f"thinker.{LEAF}"),
        # Names that transformers 5 changed: those of the class, and those of the checkpoint.
        (
            ["model.layers.0.block_sparse_moe.gate.weight"],
            "model.layers.0.mlp.gate.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            ["model.layers.0.block_sparse_moe.gate.weight"],
            "layers.0.mlp.router.weight",
            "model.layers.0.block_sparse_moe.gate.weight",
        ),
        (
            ["layers.0.mlp.gate.weight", "layers.0.block_sparse_moe.gate.weight"],
            "layers.0.mlp.gate.weight",
            "layers.0.mlp.gate.weight",
        ),
        (
            ["model.layers.0.block_sparse_moe.input_linear.weight"],
            "model.layers.0.block_sparse_moe.experts.gate_up_proj",
            "model.layers.0.block_sparse_moe.input_linear.weight",
        ),
        (["layers.10.q.weight", "model.layers.1.q.weight"], "layers.1.q.weight", "model.layers.1.q.weight"),
    ],
)  # fmt: skip
def test_one_tensor(names, asked, meant):
    assert list(paths(*names).find(asked)) == [meant]


def test_the_prefix_of_the_base_s_class():
    name = "encoder.layer.0.attention.self.query.weight"
    for model_type, prefix in (
        ("bert", "bert"),
        ("xlm-roberta", "roberta"),
        ("gpt_neox", "gpt_neox"),
    ):
        assert list(paths(name, model_type=model_type).find(f"{prefix}.{name}")) == [name]
        wrapped = paths(f"{prefix}.{name}", f"x.{name}", model_type=model_type)
        assert list(wrapped.find(name)) == [f"{prefix}.{name}"]


def test_what_is_not_there():
    assert not paths(f"model.{LEAF}").find("layers.1.self_attn.q_proj.weight")
    # A head of its own is not the model.
    assert not paths(LEAF).find(f"mtp.{LEAF}")


@pytest.mark.parametrize(
    "names",
    [
        [f"mtp.{LEAF}", f"draft.{LEAF}"],
        [f"model.{LEAF}", f"model.language_model.{LEAF}"],
        [f"language_model.model.{LEAF}", f"transformer.{LEAF}"],
    ],
)
def test_what_is_ambiguous_is_refused_and_chosen_by_match(names):
    found = paths(*names)
    with pytest.raises(InvalidRequestError) as caught:
        found.find(LEAF)
    assert caught.value.values | {"candidates": []} == {
        "base": "b",
        "module": LEAF.removesuffix(".weight"),
        "candidates": [],
    }
    assert set(caught.value.values["candidates"]) == set(names)
    for name in names:
        prefix = name.removesuffix(LEAF)
        meant = [one for one in names if one.startswith(prefix)]
        if len(meant) == 1:
            assert list(found.find(LEAF, prefix)) == meant
    with pytest.raises(InvalidRequestError, match="starts with"):
        found.check_match("visual.")


def test_match_can_choose_what_is_not_the_exact_name():
    found = paths(LEAF, f"mtp.{LEAF}")
    assert list(found.find(LEAF, "mtp.")) == [f"mtp.{LEAF}"]


def test_a_path_without_a_layer_means_all_layers_of_one_tower():
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    others = ["mtp.layers.0.self_attn.q_proj.weight", "model.visual.blocks.0.q_proj.weight"]
    assert list(paths(*names).find("q_proj.weight")) == names
    assert list(paths(*names, *others).find("q_proj.weight")) == names
    bare = [one.removeprefix("model.") for one in names]
    assert list(paths(*bare, *others).find("q_proj.weight")) == bare
    with pytest.raises(InvalidRequestError, match="could mean"):
        paths(*others).find("q_proj.weight")
    assert list(paths(*others).find("q_proj.weight", "mtp.")) == others[:1]
    with pytest.raises(InvalidRequestError, match="could mean"):
        paths(*names).find_one("q_proj.weight")

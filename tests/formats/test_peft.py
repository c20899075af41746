"""What peft means by its configuration and its tensor names."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import DATA, peft_config, peft_tensors

from bonsai_lora.errors import BonsaiLoraError, InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.peft import decode_adapter, set_tensors
from bonsai_lora.formats.peft_config import PeftConfig, parse_config
from bonsai_lora.formats.peft_fields import FIELDS

MODULE = "model.layers.0.self_attn.q_proj"
ROOT = DATA.parent.parent


def decode(rng, tensors=None, module=MODULE, **changes):
    config = PeftConfig(peft_config(**changes))
    return decode_adapter(config, peft_tensors(rng, module) if tensors is None else tensors, "s")


def adapters(found):
    return found.lora_set.registry.adapters


def test_the_table_in_the_docs_is_the_code():
    text = (ROOT / "docs" / "peft.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (honored|ignored|refused) \| (.*) \|$", text, re.MULTILINE)
    assert rows == [(name, field.policy, field.why) for name, field in FIELDS.items()]


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if field.policy == "refused"]
)
def test_refused_fields_are_refused_where_they_are_set(rng, name):
    with pytest.raises(UnsupportedAdapterError, match=name):
        decode(rng, **{name: [1]})
    with pytest.raises(UnsupportedAdapterError, match=name):
        decode(rng, **{name: {}})  # switches some of them on in peft
    for unset in (None, False, []):
        assert adapters(decode(rng, **{name: unset}))


@pytest.mark.parametrize(
    "name", [name for name, field in FIELDS.items() if field.policy == "ignored"]
)
def test_ignored_fields_change_nothing(rng, name):
    plain = decode(rng)
    for value in (0.3, 1.0, None) if name == "lora_dropout" else ({"any": "thing"},):
        other = decode(rng, **{name: value})
        assert adapters(plain)[MODULE].scaling == adapters(other)[MODULE].scaling
        assert other.warnings == []


def test_unknown_fields_are_ignored_with_a_warning(rng):
    assert "from_the_future" in decode(rng, from_the_future=1).warnings[0]


@pytest.mark.parametrize(
    ("key", "matches"),
    [
        ("q_proj", True),
        ("self_attn.q_proj", True),
        (r"layers\.\d+\.self_attn\.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        (".*q_proj", True),
        ("proj", False),
        ("layers.1.self_attn.q_proj", False),
        ("q_pro", False),
        ("^q_proj", False),
        ("^model.*q_proj", True),
        ("k_proj|q_proj", True),
    ],
)
def test_alpha_pattern_matches_as_peft_does(rng, key, matches):
    found = adapters(decode(rng, alpha_pattern={key: 20}))[MODULE]
    assert found.config.alpha == (20 if matches else 8)
    # peft's own expression (get_pattern_key in tuners_utils.py)
    assert bool(re.match(rf"(.*\.)?({key})$", MODULE)) == matches


def test_the_first_matching_key_wins(rng):
    found = decode(rng, alpha_pattern={"k_proj": 1, ".*_proj": 2, "q_proj": 3}, use_rslora=True)
    adapter = adapters(found)[MODULE]
    assert adapter.config.alpha == 2
    assert adapter.scaling == 1.0  # 2 / sqrt(4)


@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["self_attn.q_proj", "nothing"]}, True),
        ({"target_modules": [MODULE]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": ["v_proj"]}, False),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": r".*layers\.1\..*"}, True),  # expressions are not evaluated
        ({"target_modules": "("}, True),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": "ALL-LINEAR"}, True),
        ({"target_modules": None}, True),  # what that means depends on the base
        ({"modules_to_save": ["self_attn"]}, False),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"exclude_modules": ["q_proj"]}, False),
        ({"exclude_modules": r".*\.layers\.0\..*"}, True),
        ({"exclude_modules": ["k_proj"]}, True),
        ({"layers_to_transform": [0, 3]}, True),
        ({"layers_to_transform": 0}, True),
        ({"layers_to_transform": [1]}, False),
        ({"layers_to_transform": []}, True),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, True),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"]}, True),
        ({"layers_to_transform": [0], "layers_pattern": "blocks"}, False),
        ({"layers_to_transform": [0], "layers_pattern": "(layers|h)"}, True),
        ({"layers_to_transform": [1], "target_modules": [MODULE]}, True),  # an exact path
        ({"layers_to_transform": [1], "target_modules": r".*q_proj"}, True),  # an expression
    ],
)
def test_tensors_of_modules_that_peft_would_not_adapt_are_refused(rng, changes, taken):
    if taken:
        assert MODULE in adapters(decode(rng, **changes))
    else:
        with pytest.raises(InvalidAdapterError, match=r"q_proj"):
            decode(rng, **changes)


@pytest.mark.parametrize(
    ("module", "changes", "taken"),
    [
        ("layers.0.q_proj", {"layers_to_transform": [0], "layers_pattern": "layers"}, True),
        ("layers.0.q_proj", {"layers_to_transform": [0]}, False),  # as peft: nothing before it
        ("lm_head", {"target_modules": ["lm_head"]}, True),
        ("lm_head", {"target_modules": ["q_proj"]}, False),
        ("blocks.3.to-q", {"target_modules": ["to-q"]}, True),
    ],
)
def test_other_modules(rng, module, changes, taken):
    if taken:
        assert module in adapters(decode(rng, module=module, **changes))
    else:
        with pytest.raises(InvalidAdapterError, match="do not select 1 module"):
            decode(rng, module=module, **changes)


def test_names_that_would_be_read_differently_are_refused(rng):
    ones = np.ones((2, 2), np.float32)
    strange = with_extra(rng, **{"x.base_model.model.y": ones, "base_layer.weight": ones})
    with pytest.raises((InvalidAdapterError, UnsupportedAdapterError)):
        decode(rng, strange, modules_to_save=["x"])
    tensors = peft_tensors(rng)
    first, second = tensors
    mixed = {
        first.replace("lora_A", "lora_A.one"): tensors[first],
        second.replace("lora_B", "lora_B.two"): tensors[second],
    }
    with pytest.raises(InvalidAdapterError, match="several adapters"):
        decode(rng, mixed)


def test_biases_of_adapted_modules_only(rng):
    other = with_extra(rng, **{"model.norm.bias": np.ones(5, np.float32)})
    assert decode(rng, other, bias="all").lora_set.replacements
    with pytest.raises(UnsupportedAdapterError, match="would be lost"):
        decode(rng, other, bias="lora_only")


def test_a_target_without_tensors_is_a_warning(rng):
    found = decode(rng, target_modules=["q_proj", "k_proj"])
    assert found.warnings == ["target_modules names 'k_proj', which has no tensors"]


@pytest.mark.parametrize(
    "template",
    [
        "base_model.model.{}.lora_{}.weight",
        "base_model.model.{}.lora_{}.default.weight",
        "base_model.model.{}.lora_{}.my_name.weight",
        "{}.lora_{}.weight",
        "{}.lora_{}.default.weight",
    ],
)
def test_keys_with_and_without_prefix_and_adapter_name(rng, template):
    tensors = {
        template.format(MODULE, "A"): rng.standard_normal((4, 6)).astype(np.float32),
        template.format(MODULE, "B"): rng.standard_normal((5, 4)).astype(np.float32),
    }
    found = decode(rng, tensors)
    assert list(adapters(found)) == [MODULE]
    assert set(set_tensors(found.lora_set)) == {
        f"base_model.model.{MODULE}.lora_{half}.weight" for half in "AB"
    }


def with_extra(rng, **extra):
    tensors = peft_tensors(rng)
    return tensors | {f"base_model.model.{name}": value for name, value in extra.items()}


def test_dora_and_lora_bias_need_their_vectors_exactly_when_set(rng):
    vector = np.ones(5, np.float32)
    for part, flag, attribute in (
        ("lora_magnitude_vector", "use_dora", "magnitude"),
        ("lora_B.bias", "lora_bias", "bias"),
    ):
        tensors = with_extra(rng, **{f"{MODULE}.{part}": vector})
        adapter = adapters(decode(rng, tensors, **{flag: True}))[MODULE]
        assert getattr(adapter, attribute).tolist() == vector.tolist()
        assert adapter.param_count() == 4 * 11 + 5
        with pytest.raises(InvalidAdapterError, match=flag):
            decode(rng, tensors)
        with pytest.raises(InvalidAdapterError, match=flag):
            decode(rng, **{flag: True})
        short = with_extra(rng, **{f"{MODULE}.{part}": vector[:4]})
        with pytest.raises(InvalidAdapterError, match="shape"):
            decode(rng, short, **{flag: True})


def test_old_names_of_the_magnitude(rng):
    for ending in ("", ".default", ".weight", ".default.weight"):
        key = f"{MODULE}.lora_magnitude_vector{ending}"
        tensors = with_extra(rng, **{key: np.ones(5, np.float32)})
        assert adapters(decode(rng, tensors, use_dora=True))[MODULE].magnitude is not None


def test_replaced_modules_and_biases(rng):
    head = np.ones((3, 6), np.float32)
    for key in ("lm_head.weight", "lm_head.modules_to_save.default.weight"):
        found = decode(rng, with_extra(rng, **{key: head}), modules_to_save=["lm_head"])
        assert found.lora_set.replacements.keys() == {"lm_head.weight"}
        assert found.lora_set.total_trainable_params() == 4 * 11 + 18
    for key in (f"{MODULE}.bias", f"{MODULE}.base_layer.bias"):
        found = decode(rng, with_extra(rng, **{key: np.ones(5, np.float32)}), bias="all")
        assert found.lora_set.replacements.keys() == {f"{MODULE}.bias"}
    for key in (f"{MODULE}.weight", f"{MODULE}.bias", "model.norm.scale"):
        with pytest.raises(UnsupportedAdapterError, match="would be lost"):
            decode(rng, with_extra(rng, **{key: head}))


@pytest.mark.parametrize(
    "parameter", ["lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"]
)
def test_copies_of_resized_embeddings_replace_the_base_s(rng, parameter):
    copy = rng.standard_normal((3, 6)).astype(np.float32)
    found = decode(rng, with_extra(rng, **{parameter: copy}))
    assert found.lora_set.replacements[parameter] is copy
    assert found.ignored_keys == []
    assert parameter in found.warnings[0]
    assert f"base_model.model.{parameter}" in set_tensors(found.lora_set)


def test_of_three_copies_the_plain_one_counts(rng):
    """What peft 0.21 writes for a resized layer that modules_to_save names."""
    trained, original = np.ones((3, 6), np.float32), np.zeros((3, 6), np.float32)
    tensors = with_extra(
        rng,
        **{
            "lm_head.modules_to_save.weight": trained,
            "lm_head.original_module.weight": original,
            "lm_head.weight": trained,
        },
    )
    found = decode(rng, tensors, modules_to_save=["lm_head"])
    assert found.lora_set.replacements == {"lm_head.weight": trained}
    assert sorted(found.ignored_keys) == [
        "base_model.model.lm_head.modules_to_save.weight",
        "base_model.model.lm_head.original_module.weight",
    ]
    assert found.warnings == []


@pytest.mark.parametrize(
    "wrapper",
    [
        "module.base_model.model.{}",
        "base_model.model._orig_mod.{}",
        "base_model.model.base_model.model.{}",
        "_forward_module.base_model.model.module.{}",
        "base_model.model._fsdp_wrapped_module.{}",
        "pretrained_model.base_model.model.{}",
        "model.base_model.model.{}",
        "module.policy.base_model.model._orig_mod.{}",
        "_module.base_model.model.{}",
    ],
)
def test_names_of_wrappers_are_removed(rng, wrapper):
    tensors = {
        wrapper.format(key.removeprefix("base_model.model.")): value
        for key, value in peft_tensors(rng).items()
    }
    found = decode(rng, tensors)
    assert list(adapters(found)) == [MODULE]
    assert "wrappers" in found.warnings[0]


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("name", ["my_base_model.x", "base_model_x", "encoder.base_model.q"])
def test_modules_that_are_named_like_the_prefix(rng, name, prefix):
    tensors = {
        f"{prefix}{name}.q_proj.lora_{half}.weight": np.ones((4, 4), np.float32) for half in "AB"
    }
    found = decode(rng, tensors)
    assert list(adapters(found)) == [f"{name}.q_proj"]
    assert found.warnings == []


@pytest.mark.parametrize("wrapper", ["module.", "pretrained_model."])
def test_wrappers_in_some_keys_only_are_refused(rng, wrapper):
    first, second = peft_tensors(rng).items()
    tensors = {first[0]: first[1], wrapper + second[0]: second[1]}
    with pytest.raises(InvalidAdapterError, match=r"1 of 2 keys"):
        decode(rng, tensors)


@pytest.mark.parametrize("shape", [(0,), (0, 6), (4, 0)])
def test_empty_tensors_are_refused(rng, shape):
    key, *_ = tensors = peft_tensors(rng)
    with pytest.raises(InvalidAdapterError, match="ZeRO-3"):
        decode(rng, {**tensors, key: np.zeros(shape, np.float32)})


def test_embeddings(rng):
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((4, 10), np.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((6, 4), np.float32),
        "base_model.model.model.embed_tokens.base_layer.weight": np.ones((10, 6), np.float32),
    }
    found = decode(rng, tensors, target_modules=["embed_tokens"])
    adapter = adapters(found)["model.embed_tokens"]
    assert (adapter.layer, adapter.d_in, adapter.d_out) == ("embedding", 10, 6)
    assert found.lora_set.replacements.keys() == {"model.embed_tokens.weight"}
    assert "vocabulary" in found.warnings[0]
    assert set_tensors(found.lora_set).keys() == tensors.keys()


@pytest.mark.parametrize(
    "part", ["lora_embedding_A.weight", "lora_B.x.y.weight", "lora_diag.weight"]
)
def test_what_peft_takes_for_another_part_of_an_adapter_replaces_nothing(rng, part):
    tensors = with_extra(rng, **{f"model.embed_tokens.{part}": np.ones((4, 10), np.float32)})
    with pytest.raises(UnsupportedAdapterError, match="would not load 1 tensor"):
        decode(rng, tensors)


@pytest.mark.parametrize("shapes", [((4, 3, 3, 3), (8, 4, 1, 1)), ((4, 6, 3), (8, 4, 1))])
def test_convolutions_are_named(rng, shapes):
    tensors = {
        f"base_model.model.q_proj.lora_{half}.weight": np.ones(shape, np.float32)
        for half, shape in zip("AB", shapes, strict=True)
    }
    with pytest.raises(UnsupportedAdapterError, match="'q_proj' is a convolution"):
        decode(rng, tensors)


@pytest.mark.parametrize("is_same", [True, False])
def test_a_head_that_shares_the_adapter_of_the_embedding(rng, is_same):
    """With ensure_weight_tying, peft saves the head's, which target_modules does not name."""
    first, second = rng.standard_normal((2, 4, 10)).astype(np.float32)
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": first,
        "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((6, 4), np.float32),
        "base_model.model.lm_head.lora_A.weight": np.ones((4, 6), np.float32),
        "base_model.model.lm_head.lora_B.weight": (first if is_same else second).T,
    }
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    if is_same:
        assert list(adapters(decode(rng, tensors, **options))) == ["model.embed_tokens", "lm_head"]
        options["ensure_weight_tying"] = False
    with pytest.raises(InvalidAdapterError, match="do not select 1 module"):
        decode(rng, tensors, **options)


ROWS = "model.embed_tokens.token_adapter.trainable_tokens_delta"


def test_token_rows_with_the_name_of_the_adapter(rng):
    tensors = with_extra(rng, **{f"{ROWS}.default": np.ones((2, 6), np.float32)})
    found = decode(rng, tensors, trainable_token_indices=[7, 3])
    assert found.lora_set.replacements.keys() == {ROWS}


def test_token_rows(rng):
    rows = np.ones((2, 6), np.float32)
    for indices in ([7, 3], {"embed_tokens": [7, 3]}):
        found = decode(rng, with_extra(rng, **{ROWS: rows}), trainable_token_indices=indices)
        assert found.lora_set.replacements == {ROWS: rows}
        assert f"base_model.model.{ROWS}" in set_tensors(found.lora_set)
    copy = with_extra(
        rng,
        **{
            ROWS: rows,
            "model.embed_tokens.token_adapter.base_layer.weight": np.ones((9, 6), np.float32),
        },
    )
    found = decode(rng, copy, trainable_token_indices=[7, 3])
    assert found.lora_set.replacements.keys() == {ROWS, "model.embed_tokens.weight"}
    assert set_tensors(found.lora_set).keys() == copy.keys()


@pytest.mark.parametrize(
    "indices", [None, [1], [1, 2, 3], [1, 1], [-1, 2], ["1", "2"], {"lm_head": [1, 2]}, {"embed_tokens": 3}, "12"]
)  # fmt: skip
def test_token_rows_and_numbers_must_go_together(rng, indices):
    rows = np.ones((2, 6), np.float32)
    with pytest.raises(InvalidAdapterError):
        decode(rng, with_extra(rng, **{ROWS: rows}), trainable_token_indices=indices)
    with pytest.raises(InvalidAdapterError, match="trainable_token"):
        decode(rng, trainable_token_indices=[1, 2])


def test_sixteen_bit_tensors_stay_what_they_are(rng):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        tensors = {key: value.astype(dtype) for key, value in peft_tensors(rng).items()}
        adapter = adapters(decode(rng, tensors))[MODULE]
        assert adapter.a_matrix.dtype == dtype


HOSTILE = json.loads((DATA / "hostile" / "peft_configs.json").read_text())


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case["attack"])
def test_hostile_configurations(rng, case):
    changes = case.get("changes", {})
    if "repeat" in case:
        keys = (case["repeat"]["key"].format(number) for number in range(case["repeat"]["count"]))
        changes = {case["repeat"]["field"]: dict.fromkeys(keys, case["repeat"]["value"])}
    text = case["text"] if "text" in case else json.dumps(peft_config(**changes))
    with pytest.raises(BonsaiLoraError) as caught:
        module = "model." + "a" * 60 + ".q_proj"
        decode_adapter(PeftConfig(parse_config(text.encode())), peft_tensors(rng, module), "s")
    assert caught.value.code == case["code"]

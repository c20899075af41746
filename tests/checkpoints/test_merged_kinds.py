"""Adapters of the kinds that people save, merged into bases of the kinds that there are."""

import json

import numpy as np
import pytest
import reference

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import merged_files
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.core.registry import LoraRegistry
from bonsai_lora.errors import ShapeMismatchError, UnsupportedAdapterError
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.peft_options import BaseOptions

CONFIG = LoraConfig(2, 4.0)


@pytest.fixture
def base(tmp_path):
    """Makes a base of tensors and configuration."""

    def make(tensors, **config):
        folder = tmp_path / "bases" / "b"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(safetensors.encode(tensors))
        (folder / "config.json").write_text(json.dumps(config))
        return BaseFolder(folder.parent).get("b")

    return make


def adapter(rng, d_in, d_out, **options):
    a_matrix = rng.standard_normal((2, d_in)).astype(np.float32)
    b_matrix = rng.standard_normal((d_out, 2)).astype(np.float32)
    return LoraAdapter(CONFIG, a_matrix, b_matrix, 2.0, **options)


def lora_set(adapters, replacements=None):
    return BonsaiLoraSet(LoraRegistry(CONFIG, adapters), "", "s", replacements or {})


def merged(base, one, **options):
    model = MergedModel(base, [Ingredient(one, '"x-1"', 1.0, BaseOptions(**options))])
    file = merged_files(model)["model.safetensors"]
    raw = b"".join(piece() for piece in file.pieces(0, file.size_bytes))
    return safetensors.decode(raw)[0]


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def close(got, expected):
    return reference.relative_error(got, expected) < 1e-6


@pytest.mark.parametrize("is_transposed", [True, False])
def test_conv1d_weights_are_stored_in_out(base, rng, is_transposed):
    """Square and oblong ones, whatever the configuration says: GPT-2's blocks are Conv1D."""
    tensors = {"h.0.attn.c_proj.weight": normal(rng, 6, 6), "h.0.mlp.c_fc.weight": normal(rng, 6, 9),
               "lm_head.weight": normal(rng, 6, 6)}  # fmt: skip
    found = base(tensors, model_type="gpt2")
    ours = {
        "transformer.h.0.attn.c_proj": adapter(rng, 6, 6),
        "transformer.h.0.mlp.c_fc": adapter(rng, 6, 9),
        "lm_head": adapter(rng, 6, 6),
    }
    got = merged(found, lora_set(ours), is_transposed=is_transposed)
    for module, one in ours.items():
        name = f"{module.removeprefix('transformer.')}.weight"
        delta = reference.delta_weight(one.a_matrix, one.b_matrix, 2.0)
        expected = tensors[name] + (delta if module == "lm_head" else delta.T)
        assert close(got[name], expected), name


def test_oblong_weights_show_how_square_ones_are_stored(base, rng):
    tensors = {"h.0.c_proj.weight": normal(rng, 6, 6), "h.0.c_fc.weight": normal(rng, 6, 9)}
    ours = {"h.0.c_proj": adapter(rng, 6, 6), "h.0.c_fc": adapter(rng, 6, 9)}
    found = base(tensors, model_type="from-the-future")
    got = merged(found, lora_set(ours), is_transposed=True)
    for module, one in ours.items():
        delta = reference.delta_weight(one.a_matrix, one.b_matrix, 2.0)
        assert close(got[f"{module}.weight"], tensors[f"{module}.weight"] + delta.T)
    with pytest.raises(ShapeMismatchError):  # Linear, says the configuration
        merged(found, lora_set(ours), is_transposed=False)
    with pytest.raises(UnsupportedAdapterError, match="square"):
        merged(found, lora_set({"h.0.c_proj": ours["h.0.c_proj"]}), is_transposed=True)


def test_fan_in_fan_out_changes_nothing_where_layers_are_linear(base, rng):
    tensors = {"model.layers.0.self_attn.q_proj.weight": normal(rng, 6, 6)}
    one = adapter(rng, 6, 6)
    got = merged(base(tensors, model_type="qwen3"), lora_set({"layers.0.self_attn.q_proj": one}), is_transposed=True)  # fmt: skip
    ((name, weight),) = tensors.items()
    assert close(got[name], weight + reference.delta_weight(one.a_matrix, one.b_matrix, 2.0))


def test_a_targeted_matrix_without_a_layer_means_those_of_all_layers(base, rng):
    """peft's target_parameters may name the weight of a linear layer, too."""
    tensors = {f"model.layers.{one}.self_attn.q_proj.weight": normal(rng, 6, 6) for one in (0, 1)}
    one = adapter(rng, 6, 6)
    found = base(tensors, model_type="qwen3")
    got = merged(found, lora_set({"q_proj": one}), target_parameters=("q_proj.weight",))
    for name, weight in tensors.items():
        delta = reference.delta_weight(one.a_matrix, one.b_matrix, 2.0)
        assert close(got[name], weight + delta)


def test_dora_of_conv1d_scales_columns(base, rng):
    weight = normal(rng, 6, 5)
    magnitude = np.abs(normal(rng, 5)) + 0.5
    one = adapter(rng, 6, 5, magnitude=magnitude)
    found = base({"h.0.mlp.c_fc.weight": weight}, model_type="gpt2")
    got = merged(found, lora_set({"h.0.mlp.c_fc": one}), is_transposed=True)
    sums = weight.T + reference.delta_weight(one.a_matrix, one.b_matrix, 2.0)
    expected = (magnitude / np.linalg.norm(sums, axis=1))[:, None] * sums
    assert close(got["h.0.mlp.c_fc.weight"], expected.T)


TIED = {"model_type": "qwen3", "tie_word_embeddings": True}


def tied_base(base, rng):
    return base(
        {"model.embed_tokens.weight": normal(rng, 5, 3), "q.weight": normal(rng, 4, 3)}, **TIED
    )


def replaced(rng, **replacements):
    return lora_set({"q": adapter(rng, 3, 4)}, replacements)


def test_equal_copies_of_head_and_embedding_fit_a_tied_base(base, rng):
    found = tied_base(base, rng)
    copy = normal(rng, 5, 3)
    both = {"model.embed_tokens.weight": copy, "lm_head.weight": copy.copy()}
    for saved in ((), ("embed_tokens", "lm_head")):
        got = merged(found, replaced(rng, **both), saved=saved)
        assert np.array_equal(got["model.embed_tokens.weight"], copy)
    # The embedding alone, loaded into the tied parameter: the head follows.
    got = merged(found, replaced(rng, **{"embed_tokens.weight": copy}))
    assert np.array_equal(got["model.embed_tokens.weight"], copy)


def test_a_head_that_would_differ_is_refused(base, rng):
    found = tied_base(base, rng)
    embedding, head = normal(rng, 5, 3), normal(rng, 5, 3)
    for replacements, saved in (
        ({"model.embed_tokens.weight": embedding, "lm_head.weight": head}, ()),
        ({"model.embed_tokens.weight": embedding}, ("embed_tokens",)),
        ({"lm_head.weight": head}, ("lm_head",)),
    ):
        with pytest.raises(UnsupportedAdapterError, match="ties its head"):
            merged(found, replaced(rng, **replacements), saved=saved)


def test_a_base_of_the_old_vocabulary_must_grow_first(base, rng):
    found = tied_base(base, rng)
    with pytest.raises(ShapeMismatchError, match=r"resize_token_embeddings\(7\)"):
        merged(found, replaced(rng, **{"model.embed_tokens.weight": normal(rng, 7, 3)}))


def test_token_rows_replace_rows_of_the_embedding(base, rng):
    found = tied_base(base, rng)
    before = merged(found, replaced(rng))["model.embed_tokens.weight"]
    rows = normal(rng, 2, 3)
    name = "embed_tokens.token_adapter.trainable_tokens_delta"
    for indices in ([4, 1], {"embed_tokens": [4, 1]}):
        got = merged(found, replaced(rng, **{name: rows}), token_indices=indices)
        expected = before.copy()
        expected[[4, 1]] = rows
        assert np.array_equal(got["model.embed_tokens.weight"], expected)
    with pytest.raises(ShapeMismatchError, match="row 5"):
        merged(found, replaced(rng, **{name: rows}), token_indices=[0, 5])


def test_no_token_rows_replace_nothing(base, rng):
    found = tied_base(base, rng)
    before = merged(found, replaced(rng))["model.embed_tokens.weight"]
    name = "embed_tokens.token_adapter.trainable_tokens_delta"
    got = merged(found, replaced(rng, **{name: normal(rng, 0, 3)}), token_indices=[])
    assert np.array_equal(got["model.embed_tokens.weight"], before)


def test_token_rows_that_tie_and_that_do_not(base, rng):
    found = tied_base(base, rng)
    names = [f"{one}.token_adapter.trainable_tokens_delta" for one in ("embed_tokens", "lm_head")]
    rows = normal(rng, 1, 3)
    both = dict.fromkeys(names, rows)
    got = merged(found, replaced(rng, **both), token_indices=[2])
    assert np.array_equal(got["model.embed_tokens.weight"][2], rows[0])
    with pytest.raises(UnsupportedAdapterError, match="ties its head"):
        merged(found, replaced(rng, **both), token_indices={"embed_tokens": [2], "lm_head": [3]})


def test_a_head_with_a_different_name_is_not_tied(base, rng):
    """GPT-NeoX keeps its head as embed_out, and its configuration may not say that it is untied."""
    embedding, head = normal(rng, 5, 3), normal(rng, 5, 3)
    tensors = {"gpt_neox.embed_in.weight": normal(rng, 5, 3), "embed_out.weight": normal(rng, 5, 3),
               "q.weight": normal(rng, 4, 3)}  # fmt: skip
    changed = {"gpt_neox.embed_in.weight": embedding, "embed_out.weight": head}
    got = merged(base(tensors, model_type="gpt_neox"), replaced(rng, **changed))
    assert np.array_equal(got["gpt_neox.embed_in.weight"], embedding)
    assert np.array_equal(got["embed_out.weight"], head)


def tied_head(embedding):
    """The adapter that peft saves for the head with ensure_weight_tying."""
    a_matrix, b_matrix = embedding.b_matrix.T.copy(), embedding.a_matrix.T.copy()
    return LoraAdapter(CONFIG, a_matrix, b_matrix, 2.0)


@pytest.mark.parametrize(
    "name", ["model.embed_tokens", "backbone.embeddings", "model.tok_embeddings"]
)
def test_a_tied_base_gets_the_adapter_of_embedding_and_head_once(base, rng, name):
    before = normal(rng, 9, 6)
    found = base({f"{name}.weight": before}, tie_word_embeddings=True)
    embedding = adapter(rng, 9, 6, layer="embedding")
    got = merged(found, lora_set({name: embedding, "lm_head": tied_head(embedding)}))
    delta = reference.delta_weight(embedding.a_matrix, embedding.b_matrix, 2.0)
    assert close(got[f"{name}.weight"], before + delta.T)
    for other in ({}, {"lm_head": adapter(rng, 6, 9)}):
        with pytest.raises(UnsupportedAdapterError, match="ties its head"):
            merged(found, lora_set({name: embedding, **other}))


def test_an_untied_base_gets_it_twice(base, rng):
    tensors = {"model.embed_tokens.weight": normal(rng, 9, 6), "lm_head.weight": normal(rng, 9, 6)}
    embedding = adapter(rng, 9, 6, layer="embedding")
    both = lora_set({"model.embed_tokens": embedding, "lm_head": tied_head(embedding)})
    got = merged(base(tensors, tie_word_embeddings=False), both)
    delta = reference.delta_weight(embedding.a_matrix, embedding.b_matrix, 2.0)
    for name, before in tensors.items():
        assert close(got[name], before + delta.T)


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("kind", ["BertForSequenceClassification", "XForQuestionAnswering"])
def test_a_class_without_a_language_model_s_head_ties_nothing(base, rng, kind, is_saved):
    """BERT's configuration ties the embedding, but not to this head."""
    name = "bert.embeddings.word_embeddings"
    before = normal(rng, 9, 6)
    tensors = {f"{name}.weight": before, "classifier.weight": normal(rng, 2, 6)}
    found = base(tensors, architectures=[kind], tie_word_embeddings=True)
    embedding, after = adapter(rng, 9, 6, layer="embedding"), normal(rng, 9, 6)
    if is_saved:
        one = lora_set({}, {f"{name}.weight": after})
        got = merged(found, one, saved=("word_embeddings",))
    else:
        got = merged(found, lora_set({name: embedding}))
        after = before + reference.delta_weight(embedding.a_matrix, embedding.b_matrix, 2.0).T
    assert close(got[f"{name}.weight"], after)

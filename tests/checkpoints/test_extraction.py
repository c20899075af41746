"""Which form the change of one tensor has, and how it is read."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from bonsai_lora.checkpoints import difference
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.difference import Difference
from bonsai_lora.checkpoints.extraction import Size, extract, pairs_of
from bonsai_lora.errors import BaseChangedError, InvalidRequestError
from bonsai_lora.formats import safetensors


@pytest.fixture
def opened(tmp_path):
    """Writes checkpoints, of one file each, and opens them."""

    def open_(base, tuned, **config):
        for name, tensors in (("base", base), ("tuned", tuned)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(safetensors.encode(tensors))
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return [BaseFolder(tmp_path).get(name) for name in ("base", "tuned")]

    return open_


@pytest.fixture
def extracted(opened):
    """Returns what became of the only tensor, `name`, with the values `base` and `tuned`."""

    def extract_(name, base, tuned, rank=2, energy=None, **config):
        base, tuned = opened({name: base}, {name: tuned}, **config)
        (pair,) = pairs_of(base, tuned, [])
        return extract(base, pair, Size(rank, energy), lambda: None, lambda _: None)

    return extract_


def of_rank(rng, rank, shape):
    left, right = rng.standard_normal((shape[0], rank)), rng.standard_normal((rank, shape[1]))
    return (left @ right).astype(np.float32)


@pytest.mark.parametrize(("changed", "kind"), [(1, "token_rows"), (4, "token_rows"), (5, "lora")])
def test_up_to_one_row_of_a_hundred_of_an_embedding_is_kept_as_rows(extracted, rng, changed, kind):
    base = rng.standard_normal((400, 8)).astype(np.float32)
    tuned = base.copy()
    rows = np.sort(rng.choice(400, changed, replace=False))
    tuned[rows] += 1
    found = extracted("model.embed_tokens.weight", base, tuned, tie_word_embeddings=False)
    assert found.kind == kind
    if kind == "token_rows":
        assert np.array_equal(found.rows, rows)
        assert np.array_equal(found.replacement, tuned[rows])


@pytest.mark.parametrize(
    ("rank", "energy", "of", "kind"),
    [
        (3, None, 8, "lora"),  # 3 * (8 + 8) < 8 * 8
        (4, None, 1, "replaced"),  # 4 * (8 + 8) = 8 * 8, whatever the rank turns out to be
        (8, 1.0, 3, "lora"),
        (8, 1.0, 4, "replaced"),
    ],
)
def test_a_low_rank_must_be_smaller_than_the_matrix(extracted, rng, rank, energy, of, kind):
    base = rng.standard_normal((8, 8)).astype(np.float32)
    tuned = base + of_rank(rng, of, (8, 8))
    found = extracted("q_proj.weight", base, tuned, rank, energy)
    assert found.kind == kind
    if kind == "replaced":
        assert np.array_equal(found.replacement, tuned)
        assert found.lost_square == 0


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("norm.weight", (8,), "replaced"),
        ("norm.bias", (8,), "replaced"),
        ("scale.weight", (), "replaced"),
        ("sinks", (8,), "left_out"),
        ("experts.down_proj", (2, 8), "left_out"),
        ("conv.weight", (4, 2, 2), "left_out"),
    ],
)
def test_what_is_no_matrix_is_replaced_if_a_module_has_it(extracted, rng, name, shape, kind):
    base = rng.standard_normal(shape).astype(np.float32)
    found = extracted(name, base, np.asarray(base + 1, np.float32))
    assert found.kind == kind
    if kind == "replaced":
        assert np.array_equal(found.replacement, base + 1)
        assert found.replacement.shape == shape
        assert found.parameter == name
    else:
        assert found.lost_square == found.square > 0


@pytest.mark.parametrize("wide", ["base", "tuned", "both"])
def test_differences_of_float64_are_computed_in_float64(extracted, rng, wide):
    """A change of 1e-10 vanishes if either is rounded to float32 first."""
    base = rng.standard_normal((8, 40)).astype(np.float32).astype(np.float64)
    delta = of_rank(rng, 1, (8, 40)).astype(np.float64) * 1e-10
    low, high = (base + delta, base) if wide == "base" else (base, base + delta)
    found = extracted(
        "q_proj.weight",
        low if wide != "tuned" else low.astype(np.float32),
        high if wide != "base" else high.astype(np.float32),
        rank=1,
    )
    sign = -1 if wide == "base" else 1
    got = found.adapter.b_matrix.astype(float) @ found.adapter.a_matrix
    assert np.allclose(got, sign * delta, rtol=1e-4, atol=1e-15)


def test_replacements_are_float32_at_most(extracted, rng):
    base = rng.standard_normal(8)
    found = extracted("norm.weight", base, base + 1)
    assert found.replacement.dtype == np.float32
    assert np.allclose(found.replacement, base + 1)


def test_narrow_replacements_stay_narrow(extracted, rng):
    base = rng.standard_normal(8).astype(ml_dtypes.bfloat16)
    tuned = (base.astype(np.float32) * 2).astype(ml_dtypes.bfloat16)
    found = extracted("norm.weight", base, tuned)
    assert found.replacement.dtype == ml_dtypes.bfloat16
    assert found.size_bytes == 16


@pytest.mark.parametrize("values", [(3e38, -3e38), (0, np.inf), (np.nan, np.nan)])
def test_differences_that_are_no_numbers_are_refused(extracted, values):
    base, tuned = (np.full((8, 8), one, np.float32) for one in values)
    with pytest.raises(InvalidRequestError, match=r"'q\.weight' has NaN, infinity or a difference"):
        extracted("q.weight", base, tuned)


def test_modules_are_named_by_their_path_or_its_end(opened, rng):
    names = ["a.q_proj.weight", "a.q_proj.bias", "b.q_proj.weight", "b.proj.weight"]
    tensors = {name: np.ones(3, np.float32) for name in names} | {"ids": np.ones(3, np.int64)}
    base, tuned = opened(tensors, tensors)

    def named(*modules):
        return [one.name for one in pairs_of(base, tuned, modules)]

    assert named() == names, "without the integers"
    assert named("q_proj") == names[:3]
    assert named("a.q_proj") == names[:2]
    assert named("proj", "a.q_proj") == [*names[:2], names[3]]
    with pytest.raises(InvalidRequestError, match="no module '_proj'"):
        named("_proj")


def test_a_head_is_compared_unless_both_share_it(opened, tmp_path, rng):
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    values = rng.standard_normal((6, 4)).astype(np.float32)
    tied, own = opened({embedding: values}, {embedding: values, head: values + 1})
    assert (tied.is_tied, own.is_tied) == (True, False)
    assert [one.name for one in pairs_of(tied, tied, [])] == [embedding]
    for base, tuned in ((tied, own), (own, tied)):
        pairs = {one.name: one for one in pairs_of(base, tuned, [])}
        assert pairs.keys() == {embedding, head}
        survey = Difference(pairs[head].base, pairs[head].tuned, lambda: None).survey()
        assert survey.square == pytest.approx(values.size)


@pytest.mark.parametrize("is_held", [True, False])
def test_a_difference_up_to_the_limit_is_read_once(opened, tmp_path, monkeypatch, rng, is_held):
    base, delta = rng.standard_normal((2, 6, 4)).astype(np.float32)
    delta[[1, 4]] = 0
    bases = opened({"q.weight": base}, {"q.weight": base + delta})
    monkeypatch.setattr(difference, "HELD_VALUES", 24 if is_held else 23)
    (pair,) = pairs_of(*bases, [])
    found = Difference(pair.base, pair.tuned, lambda: None)
    without = 6 * 8 * difference._BLOCK_VALUES
    assert found.work_bytes == without + (4 * 24 if is_held else 0)
    survey = found.survey()
    assert survey.changed_rows.tolist() == [0, 2, 3, 5]
    assert survey.square == pytest.approx(np.sum((base + delta - base).astype(float) ** 2))
    assert survey.base_square == pytest.approx(np.sum(base.astype(float) ** 2))
    assert np.array_equal(np.concatenate([*found.blocks()]), base + delta - base)
    os.truncate(tmp_path / "tuned" / "model.safetensors", 10)
    if is_held:
        assert np.array_equal(np.concatenate([*found.blocks()]), base + delta - base)
    else:
        with pytest.raises(BaseChangedError):
            next(found.blocks())


@pytest.mark.parametrize("is_held", [True, False])
def test_each_block_can_be_interrupted(opened, monkeypatch, rng, is_held):
    base = rng.standard_normal((6, 4)).astype(np.float32)
    bases = opened({"q.weight": base}, {"q.weight": base + 1})
    monkeypatch.setattr(difference, "_BLOCK_VALUES", 8)
    monkeypatch.setattr(difference, "HELD_VALUES", 24 if is_held else 0)
    asked = []
    (pair,) = pairs_of(*bases, [])
    found = Difference(pair.base, pair.tuned, lambda: asked.append(1))
    found.survey()
    assert len(asked) == 3
    assert len([*found.blocks()]) == 3
    assert len(asked) == 6

"""Bases that are split into several GGUF files."""

import gguf_files
import gguf_models
import numpy as np
import pytest
from test_gguf_base import ADAPTED, adapters, content, merge

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering, hub_files, merged_files
from bonsai_lora.errors import InvalidBaseError
from bonsai_lora.formats import gguf, safetensors

COUNTS = (10, 8, 7)
"""Tensors of the parts; a tiny Qwen3 has 25."""


@pytest.fixture
def write(tmp_path):
    """Writes parts to a folder below the folder of bases, or to that itself; returns the bases."""

    def write_(parts, folder="b"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for end, raw in parts.items():
            (tmp_path / folder / f"b{end}").write_bytes(raw)
        return BaseFolder(tmp_path)

    return write_


@pytest.mark.parametrize("folder", ["b", "."])
@pytest.mark.parametrize("counts", [COUNTS, (0, 25), (25, 0)])
def test_parts_are_one_base(write, tmp_path, rng, folder, counts):
    raw, weights = gguf_models.model("Q1_0", rng)
    bases = write(gguf_files.parts_of(raw, counts), folder)
    (tmp_path / "whole.gguf").write_bytes(raw)
    assert bases.names() == ["b", "whole"]
    base, whole = bases.get("b"), bases.get("whole")
    assert [*base.files] == [f"b-{n + 1:05}-of-{len(counts):05}.gguf" for n in range(len(counts))]
    assert (base.dtypes, base.parameter_count) == (whole.dtypes, whole.parameter_count)
    made = adapters(weights, ADAPTED, rng)
    for options in ({"dtype": "F16"}, {"dtype": "F32", "is_widened": True}):
        ours = merged_files(merge(base, made), Rendering(**options))
        theirs = merged_files(merge(whole, made), Rendering(**options))
        assert content(ours["b.gguf"]) == content(theirs["whole.gguf"])
        for name in ("model.safetensors", "config.json"):
            assert content(ours[name]) == content(theirs[name])
    assert [*hub_files(MergedModel(base, []))] == ["config.json", "model.safetensors"]


def test_a_merged_file_is_whole_and_any_range_is_a_slice_of_it(write, rng):
    raw, weights = gguf_models.model("Q1_0", rng)
    base = write(gguf_files.parts_of(raw, COUNTS)).get("b")
    file = merged_files(merge(base, adapters(weights, ADAPTED, rng)), Rendering("F16"))["b.gguf"]
    whole = content(file)
    header = gguf.read_header(gguf.reader_of(whole), len(whole))
    assert not [key for key in header.pairs if key.startswith("split.")]
    assert [*header.tensors] == [*gguf.read_header(gguf.reader_of(raw), len(raw)).tensors]
    for start in range(0, len(whole), 30_011):
        stop = min(len(whole), start + 40_000)
        assert b"".join(bytes(one()) for one in file.pieces(start, stop)) == whole[start:stop]


def test_tokenizer_files_beside_the_parts_belong_to_the_base(write, tmp_path, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    bases = write(gguf_files.parts_of(raw, COUNTS))
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    files = hub_files(MergedModel(bases.get("b"), []))
    assert content(files["tokenizer.json"]) == b"{}"
    assert safetensors.decode(content(files["model.safetensors"]))[0]


def without(parts, *places):
    return {end: raw for place, (end, raw) in enumerate(parts.items()) if place not in places}


def test_a_missing_part_is_named(write, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    parts = gguf_files.parts_of(raw, COUNTS)
    bases = write(without(parts, 1))
    with pytest.raises(InvalidBaseError, match=r"3 files, but b-00002-of-00003\.gguf is missing"):
        bases.get("b")
    assert bases.names() == ["b"]
    assert write(parts).get("b").parameter_count


@pytest.mark.parametrize(
    ("counts", "kept"), [(COUNTS, 0), (COUNTS, 1), (COUNTS, 2), ((12, 13), 0), ((12, 13), 1)]
)
def test_one_part_alone_is_refused(write, rng, counts, kept):
    raw, _ = gguf_models.model("Q1_0", rng)
    parts = gguf_files.parts_of(raw, counts)
    bases = write(without(parts, *({*range(len(counts))} - {kept})), ".")
    with pytest.raises(InvalidBaseError, match=r"(is|are) missing; copy all parts"):
        bases.get("b")


@pytest.mark.parametrize("most", [25, 24])
def test_the_tensors_of_all_parts_are_counted(write, rng, monkeypatch, most):
    raw, _ = gguf_models.model("Q1_0", rng)
    bases = write(gguf_files.parts_of(raw, COUNTS))
    monkeypatch.setattr(gguf, "MAX_TENSORS", most)
    if most == 25:
        assert len(bases.get("b").tensor_names) == 25
    else:
        with pytest.raises(InvalidBaseError, match="the parts have more than 24 tensors"):
            bases.get("b")


def test_a_folder_has_one_model(write, tmp_path, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    parts = gguf_files.parts_of(raw, COUNTS)
    bases = write(parts)
    for end, one in parts.items():
        (tmp_path / "b" / f"other{end}").write_bytes(one)
    with pytest.raises(InvalidBaseError, match=r"6 GGUF files.*a folder of its own"):
        bases.get("b")


def changed(parts, place, raw):
    return {end: raw if number == place else one for number, (end, one) in enumerate(parts.items())}


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("renamed", r"split\.count is 3, which is not what its name says"),
        ("swapped", r"part 2 of 3 by its keys, counted from 0"),
        ("of a different split", r"part 1 of 2 by its keys"),
        ("too many", r"b-00004-of-00004\.gguf of base 'b': it is not one of the 3 parts"),
        ("another count", r"split\.tensors\.count is 24, but the parts have 25 tensors"),
        ("a tensor twice", r"its tensor 'token_embd\.weight' is in another part, too"),
        ("malformed", r"b-00002-of-00003\.gguf of base 'b': not a valid GGUF file"),
        ("not split", r"split\.count is None, which is not what its name says"),
        ("an array", r"split\.count is None"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(write, rng, case, reason):
    raw, _ = gguf_models.model("Q1_0", rng)
    parts = gguf_files.parts_of(raw, COUNTS)
    first, second, third = parts
    two = gguf_files.parts_of(raw, (12, 13))
    twice = gguf_files.parts_of(raw, (25, 0, 0), **{"split.tensors.count": np.int32(26)})
    cases = {
        "renamed": {"-1.gguf": parts[first]},
        "swapped": {first: parts[first], second: parts[third], third: parts[second]},
        "of a different split": changed(parts, 1, [*two.values()][1]),
        "too many": parts | {"-00004-of-00004.gguf": parts[third]},
        "another count": gguf_files.parts_of(raw, COUNTS, **{"split.tensors.count": np.int32(24)}),
        "a tensor twice": changed(twice, 1, [*gguf_files.parts_of(raw, (0, 1, 24)).values()][1]),
        "malformed": changed(parts, 1, parts[second][:50]),
        "not split": {first: raw, second: parts[second], third: parts[third]},
        "an array": gguf_files.parts_of(raw, COUNTS, **{"split.count": np.ones(3, np.uint16)}),
    }
    bases = write(cases[case])
    with pytest.raises(InvalidBaseError, match=reason) as caught:
        bases.get("b")
    assert caught.value.values == {"base": "b"}


def test_a_changed_part_is_a_different_base(write, rng):
    raw, _ = gguf_models.model("Q1_0", rng)
    other, _ = gguf_models.model("Q1_0", np.random.default_rng(1))
    before = write(gguf_files.parts_of(raw, COUNTS)).get("b").digest
    parts = gguf_files.parts_of(raw, COUNTS)
    bases = write(changed(parts, 2, [*gguf_files.parts_of(other, COUNTS).values()][2]))
    assert bases.get("b").digest != before

"""Any value under any key of a GGUF file: it is used, or refused, and nothing else happens."""

import collections
import json

import gguf_files
import gguf_models
import numpy as np
import pytest

from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import MergedModel
from bonsai_lora.checkpoints.merged_files import Rendering, hub_files, merged_files
from bonsai_lora.errors import BonsaiLoraError
from bonsai_lora.formats import gguf, gguf_writer
from bonsai_lora.formats.gguf_names import ARCHITECTURES
from bonsai_lora.formats.hadamard import PREFIX

VALUES = [
    *(np.uint32(one) for one in (0, 1, 3, 7, 2**31, 2**32 - 1)),
    *(np.uint64(2**63), np.int32(-1), np.int64(-(2**63)), np.uint8(2), True, False),
    *(np.float32(one) for one in (0, -1, "nan", "inf")),
    *(np.float64(1e300), "", "yarn", "none", "x" * 1000, ["a", "b"], []),
    *(np.array(one, np.int32) for one in ([], [1, 2, 3], [-1, 2**31 - 1, 0, 5])),
    *(np.ones(100, np.bool_), np.array([np.nan])),
]
OPTIONAL = [
    *("rope.scaling.type", "rope.scaling.factor", "rope.dimension_count", "expert_count"),
    *("attention.sliding_window_pattern", "attention.recurrent_layers", "nextn_predict_layers"),
    *("full_attention_interval", "attention.sliding_window"),
]
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": [chr(33 + one) for one in range(96)],
    "tokenizer.ggml.token_type": np.ones(96, np.int32),
    "tokenizer.ggml.merges": ["! !"],
    "tokenizer.ggml.eos_token_id": np.uint32(2),
}


def changed(raw, rng):
    """The file with another value under one or two of its keys, or of those that it may have."""
    read = gguf.reader_of(raw)
    header = gguf.read_header(read, len(raw))
    pairs = {key: gguf_writer.encoded_value(read, one) for key, one in header.pairs.items()}
    keys = [*pairs, *(f"{header.architecture}.{one}" for one in OPTIONAL)]
    keys += [f"{PREFIX}{one}" for one in ("version", "weight_names", "sign_widths", "sign_values")]
    keys += ["split.count", "general.type"]
    for key in rng.choice(keys, rng.integers(1, 3)):
        if key != "general.alignment":
            pairs[str(key)] = VALUES[rng.integers(len(VALUES))]
    tensors = {
        name: (one.type.name, one.shape, bytes(raw[one.start : one.stop]))
        for name, one in header.tensors.items()
    }
    return gguf_files.file_of(pairs, tensors)


def read_ends(files):
    for name, file in files.items():
        size = file.size_bytes
        for start, stop in ((0, min(size, 5000)), (max(0, size - 5000), size)):
            assert sum(len(piece()) for piece in file.pieces(start, stop)) == stop - start
        if name == "config.json":
            raw = b"".join(bytes(piece()) for piece in file.pieces(0, size))
            json.loads(raw, parse_constant=pytest.fail)


@pytest.mark.parametrize("architecture", [*sorted(ARCHITECTURES), "folded"])
def test_any_value_is_used_or_refused(tmp_path, architecture):
    rng = np.random.default_rng(11)
    raw, _ = (
        gguf_models.folded(rng, **TOKENIZER)
        if architecture == "folded"
        else gguf_models.model("Q1_0", rng, architecture=architecture, **TOKENIZER)
    )
    outcomes = collections.Counter()
    for _ in range(40):
        (tmp_path / "new").write_bytes(changed(raw, rng))
        (tmp_path / "new").replace(tmp_path / "b.gguf")
        for make in (lambda model: merged_files(model, Rendering("Q8_0")), hub_files):
            try:
                files = make(MergedModel(BaseFolder(tmp_path).get("b"), []))
            except BonsaiLoraError as error:
                outcomes[error.code] += 1
            else:
                outcomes["read"] += 1
                read_ends(files)  # whatever is offered can be read
    assert outcomes["read"] > 10
    assert outcomes.keys() <= {"read", "invalid_base", "unsupported_gguf"}

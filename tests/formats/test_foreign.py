"""Files and tensor names of other formats, which are named in the refusal."""

import contextlib
import gzip
import io
import pickle
import time
import zipfile

import numpy as np
import pytest
from conftest import peft_config

from bonsai_lora.errors import (
    BonsaiLoraError,
    MalformedGgufError,
    MalformedMultipartError,
    MalformedSafetensorsError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats import safetensors
from bonsai_lora.formats.foreign import check_gguf_start, check_keys, check_start
from bonsai_lora.formats.peft import decode_adapter
from bonsai_lora.formats.peft_config import PeftConfig


def zipped(name):
    file = io.BytesIO()
    zipfile.ZipFile(file, "w").writestr(name, b"x" * 40)
    return file.getvalue()


def saved(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


FILES = {
    "is a PyTorch pickle": zipped("archive/data.pkl"),
    "is a zip archive": zipped("adapter/adapter_config.json"),
    "is a NumPy file": zipped("layers.0.lora_a.npy"),
    "NumPy": saved(np.zeros(3)),
    "is a pickle": pickle.dumps({"a": 1}, 4),
    "pickle": pickle.dumps({"a": 1}, 0),
    "a pickle": pickle.dumps({"a": 1}, 1),
    "gzip": gzip.compress(b"x"),
    "is a compressed file": b"BZh91AY&SY",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "GGUF": b"GGUF\3\0\0\0" + bytes(64),
    "web page": b"<Error><Code>AccessDenied</Code>",
}


MALFORMED = {"NumPy", "pickle", "a pickle", "is a compressed file", "web page"}
"""Those that are malformed_safetensors, not unsupported_adapter."""


@pytest.mark.parametrize("says", FILES)
def test_a_file_in_a_different_format_is_named(says):
    with pytest.raises(
        MalformedSafetensorsError if says in MALFORMED else UnsupportedAdapterError
    ) as caught:
        check_start(FILES[says])
    assert says in caught.value.detail


@pytest.mark.parametrize("line", [b"Entry not found\n", b"Invalid username or password.", b"x"])
def test_a_line_of_text_is_shown(line):
    for check, error in (
        (check_start, MalformedSafetensorsError),
        (check_gguf_start, MalformedGgufError),
    ):
        with pytest.raises(error, match="not a file; download it again") as caught:
            check(line)
        assert repr(line.strip().decode()) in caught.value.detail


@pytest.mark.parametrize("path", [b"adapter_model.safetensors", b"./my run/a.bin\n", b"out/model"])
def test_a_path_is_not_a_file(path):
    with pytest.raises(MalformedMultipartError, match="put @ before"):
        check_start(path)


def test_what_is_sent_in_place_of_gguf_is_named():
    for says, content in FILES.items():
        if says != "GGUF":
            with pytest.raises(MalformedGgufError, match=r"^adapter_gguf is ") as caught:
                check_gguf_start(content)
            assert says in caught.value.detail
    with pytest.raises(MalformedGgufError, match="send it as the part adapter_model"):
        check_gguf_start(safetensors.encode({"a": np.zeros(3, np.float32)}))
    with pytest.raises(MalformedGgufError, match="-F adapter_gguf=@"):
        check_gguf_start(b"lora.gguf")
    check_gguf_start(FILES["GGUF"])
    check_gguf_start(bytes(100))  # left to its reader


@pytest.mark.parametrize("length", [0x0280, 0x0580, 0x4280, 0x717D])
def test_a_length_that_looks_like_a_format_is_left_to_its_reader(length):
    check_start(length.to_bytes(8, "little") + b"{" + b" " * length)


KEYS = {
    "kohya": "lora_unet_x.lora_down.weight",
    "LoHa": "lora_unet_x.hada_w1_a",
    "LoKr": "lycoris_x.lokr_w1",
    "LyCORIS": "lora_unet_x.b1.weight",
    "those of LyCORIS": "lycoris_x.diff",
    "XLabs": "double_blocks.0.processor.qkv_lora1.down.weight",
    "diffusers": "unet.x.processor.to_q_lora.up.weight",
    "GGUF LoRA": "blk.0.attn_q.weight.lora_a",
    "bitsandbytes": "base_model.model.layers.0.q_proj.base_layer.weight.absmax",
    "quantized": "base_model.model.layers.0.q_proj.base_layer.SCB",
    "NeMo": "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight",
    "method other than LoRA": "base_model.model.layers.0.q_proj.miss_block",
    "PEFT method other": "base_model.model.layers.0.q_proj.fourierft_spectrum.default",
    "not those of PEFT": "transformer.h.0.attn.attn.lora_A",
    "such as 'layers.0.q_proj.lora_A.v1.2.weight'": "layers.0.q_proj.lora_A.v1.2.weight",
    "it is not an adapter": "model.layers.0.self_attn.q_proj.weight",
}


@pytest.mark.parametrize("part", ["adapter.", "adapter_layer.x.", "lora_unet_", ".lora.", ".a1."])
def test_a_long_name_takes_no_longer_than_reading_it(part):
    """A pattern that looks at the rest of the name from each part took minutes for this one."""
    before = time.process_time()
    with contextlib.suppress(UnsupportedAdapterError):
        check_keys([part * 50_000])
    assert time.process_time() - before < 5


@pytest.mark.parametrize("says", KEYS)
def test_tensor_names_of_a_different_format_are_named(says):
    tensors = {key: np.ones((4, 8), np.float32) for key in ("lora_unet_x.alpha", KEYS[says])}
    if not KEYS[says].startswith("lora_unet"):
        del tensors["lora_unet_x.alpha"]
    with pytest.raises(BonsaiLoraError) as caught:
        decode_adapter(PeftConfig(peft_config(r=4)), tensors, "s")
    assert says in caught.value.detail


@pytest.mark.parametrize("part", ["road_encoder", "miss_net", "adapter.block", "poly_x", "b1"])
def test_names_of_modules_are_no_format(part):
    tensors = {
        f"base_model.model.{part}.q_proj.lora_A.weight": np.ones((4, 8), np.float32),
        f"base_model.model.{part}.q_proj.lora_B.weight": np.ones((8, 4), np.float32),
        f"base_model.model.{part}.weight": np.ones(3, np.float32),
    }
    config = PeftConfig(peft_config(r=4, target_modules=["q_proj"]))
    assert list(decode_adapter(config, tensors, "s").lora_set.registry.adapters) == [
        f"{part}.q_proj"
    ]

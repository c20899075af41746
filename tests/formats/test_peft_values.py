"""Values of adapter_config.json that are no values, and texts that are not adapter_config.json."""

import numpy as np
import pytest
from safetensors.numpy import save

from bonsai_lora.errors import (
    InvalidAdapterError,
    MalformedMultipartError,
    UnsupportedAdapterError,
)
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import PeftConfig, parse_config


@pytest.mark.parametrize("value", [0, -1, 1.5, 4.0, True, "4", None, [4]])
def test_ranks_of_patterns_are_positive_integers(value):
    raw = {"peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": value}}
    with pytest.raises(InvalidAdapterError, match="expected positive integers") as caught:
        PeftConfig(raw)
    assert caught.value.values == {"field": "rank_pattern"}


@pytest.mark.parametrize("text", [b"adapter_config.json", b" ./a b/config.json\n"])
def test_a_path_is_not_a_file(text):
    with pytest.raises(MalformedMultipartError):
        check_config_start(text)


@pytest.mark.parametrize("text", [b"{}", b"[1]", b"", b'\xef\xbb\xbf{"a":"b.json', b'{"a":"b.json'])
def test_what_may_be_a_file_is_left_to_its_reader(text):
    check_config_start(text)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ('"r": null', "r is null, but r must be a positive integer"),
        ('"r": 0', "r is 0, but r must be"),
        ('"lora_alpha": true', "lora_alpha is true; expected a finite number"),
        ('"lora_alpha": "16"', "lora_alpha is '16'; expected"),
        ('"target_modules": {"größe": null}', "target_modules is {'größe': null}; expected"),
        ('"bias": null', "bias is null; expected none, all or lora_only"),
        ('"rank_pattern": {"q": null}', "rank_pattern has the value null"),
        ('"use_rslora": "false"', "use_rslora is 'false'; expected true or false"),
        ('"use_dora": "no"', "use_dora is 'no'; expected true or false"),
        ('"lora_bias": "none"', "lora_bias is 'none'; expected true or false"),
        ('"fan_in_fan_out": [1]', "fan_in_fan_out is [1]; expected true or false"),
    ],
)
def test_values_are_shown_as_they_were_written(changes, says):
    raw = parse_config(f'{{"peft_type": "LORA", {changes}}}'.encode())
    with pytest.raises(InvalidAdapterError) as caught:
        PeftConfig(raw)
    assert caught.value.detail.startswith(says)


@pytest.mark.parametrize("text", [b"null", b"[1]", b"'a'", b"3"])
def test_a_configuration_is_an_object(text):
    with pytest.raises(InvalidAdapterError, match="expected an object") as caught:
        parse_config(text.replace(b"'", b'"'))
    assert f"is {text.decode()}; " in caught.value.detail


def test_a_configuration_that_is_nested_too_deeply():
    with pytest.raises(InvalidAdapterError, match="nested too deeply to be read; send"):
        parse_config(b"[" * 100_000)


@pytest.mark.parametrize("value", [True, False, None, 0, 1])
def test_flags(value):
    raw = {"peft_type": "LORA", "use_rslora": value, "fan_in_fan_out": value}
    config = PeftConfig(raw)
    assert config.scalings(["q_proj"])["q_proj"].is_rslora == bool(value)
    assert config.options.is_transposed == bool(value)


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal"])
def test_start_values_that_keep_the_base(value):
    PeftConfig({"peft_type": "LORA", "init_lora_weights": value})


@pytest.mark.parametrize("value", ["olora", "PiSSA_niter_4", "lora_ga", "true", "svd_of_the_base"])
def test_start_values_that_may_have_changed_the_base(value):
    with pytest.raises(UnsupportedAdapterError, match="base weights") as caught:
        PeftConfig({"peft_type": "LORA", "init_lora_weights": value})
    assert value in caught.value.detail


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_configuration_is_not_the_weights(dtype):
    weights = save({"lora_A": np.ones((2, 4), dtype)})
    with pytest.raises(InvalidAdapterError, match="is not JSON: it is binary; send the file"):
        parse_config(weights)

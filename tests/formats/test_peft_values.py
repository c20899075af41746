"""Values of adapter_config.json that are no values, and texts that are not adapter_config.json."""

import pytest

from bonsai_lora.errors import InvalidAdapterError, MalformedMultipartError
from bonsai_lora.formats.foreign import check_config_start
from bonsai_lora.formats.peft_config import PeftConfig


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

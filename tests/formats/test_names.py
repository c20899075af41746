"""Which names sets and modules may have: at every limit, and every letter of ASCII."""

import string

import pytest

from bonsai_lora.errors import InvalidNameError
from bonsai_lora.formats.names import check_module_name, check_set_name, is_base_name, is_set_name


@pytest.mark.parametrize(
    "name",
    ["a", "0", "A-b_c.d", "a" * 96, "a.", "a-", "a..b", "v10", "V1", "apis", "adapter", "mixed2"],
)
def test_names_of_sets(name):
    assert is_set_name(name)
    check_set_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "\na", "a\0", "ä", "a" * 97, "٣"],
)
def test_what_is_not_a_name_of_a_set(name):
    assert not is_set_name(name)
    with pytest.raises(InvalidNameError):
        check_set_name(name)


@pytest.mark.parametrize("name", ["adapters", "api", "bases", "mixed", "stats"])
def test_reserved_names(name):
    with pytest.raises(InvalidNameError, match="reserved"):
        check_set_name(name)
    assert is_set_name(name)  # one that an older release stored is served
    assert not is_base_name(name)


@pytest.mark.parametrize("letter", [chr(code) for code in range(128)], ids=ascii)
def test_letters(letter):
    plain = letter in string.ascii_letters + string.digits
    assert is_set_name(f"a{letter}a") == (plain or letter in "._-")
    assert is_set_name(f"{letter}a") == plain
    try:
        check_module_name(f"a{letter}a")
    except InvalidNameError:
        assert not plain
        assert letter not in "._-"
    else:
        assert plain or letter in "._-"


@pytest.mark.parametrize("name", ["q_proj", "model.layers.0.self_attn.q_proj", "0", "a" * 256, "_"])
def test_names_of_modules(name):
    assert check_module_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "a.", ".a", "a..b", "a b", "a/b", "a\n", "a" * 257])
def test_what_is_not_a_name_of_a_module(name):
    with pytest.raises(InvalidNameError):
        check_module_name(name)


@pytest.mark.parametrize("name", ["v1", "v2", "docs", "page", "stat", "x.mixed"])
def test_names_that_only_bases_must_not_have(name):
    assert check_set_name(name) == name


@pytest.mark.parametrize(
    "name", ["adapters", "api", "bases", "docs", "mixed", "page", "stats", "v1", "v2", ".", "a/b"]
)
def test_names_of_bases(name):
    assert not is_base_name(name)
    assert is_base_name(f"{name.strip('./')}x".replace("/", "-"))

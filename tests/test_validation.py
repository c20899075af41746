"""What pydantic finds wrong is described in our words, for every kind of value."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from bonsai_lora.validation import _EXPECTED, as_written, expectation


class Cat(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


COW = "'kind' is 'cow'; expected one of 'cat', 'dog'"
CASES = [
    (Cat, {}, "it is missing; add it"),
    (Cat, {"kind": "cat", "more": 1}, "it is unknown; remove it"),
    (Cat, 5, "expected an object"),
    (bool, "perhaps", "expected true or false"),
    (bool, [], "expected true or false"),
    (int, "many", "expected an integer"),
    (int, "9" * 5000, "expected a shorter integer"),
    (int, [], "expected an integer"),
    (int, 1.5, "expected an integer"),
    (float, "many", "expected a number"),
    (float, [], "expected a number"),
    (Annotated[float, Field(allow_inf_nan=False)], float("nan"), "expected a finite number"),
    (str, 5, "expected a string"),
    (list[int], 5, "expected a list"),
    (dict[str, int], 5, "expected an object"),
    (Literal["auto", "off"], "on", "expected 'auto' or 'off'"),
    (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "cow"}, COW),
    (Annotated[int, Field(ge=1)], 0, "expected 1 or more"),
    (Annotated[float, Field(gt=0)], 0, "expected more than 0"),
    (Annotated[float, Field(le=1e6)], 1e9, "expected 1000000 or less"),
    (Annotated[float, Field(lt=0.5)], 1, "expected less than 0.5"),
    (Annotated[str, Field(min_length=2)], "a", "expected a length of 2 or more"),
    (Annotated[str, Field(max_length=2)], "abc", "expected a length of 2 or less"),
    (Annotated[str, Field(pattern="^[a-z]$")], "A", "expected text that matches ^[a-z]$"),
    (Annotated[list[int], Field(min_length=1)], [], "expected a list of 1 or more"),
    (Annotated[list[int], Field(max_length=1)], [1, 2], "expected a list of 1 or fewer"),
]


def error_of(kind: Any, value: Any) -> Any:
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(kind).validate_python(value)
    return refused.value.errors()[0]


@pytest.mark.parametrize(("kind", "value", "text"), CASES)
def test_what_was_expected(kind, value, text):
    assert expectation(error_of(kind, value)) == text


def test_every_text_is_tested():
    found = {error_of(kind, value)["type"] for kind, value, _ in CASES}
    found.add(error_of_attributes())
    assert found == set(_EXPECTED)


def error_of_attributes():
    with pytest.raises(ValidationError) as refused:
        TypeAdapter(Cat).validate_python(5, from_attributes=True)
    (error,) = refused.value.errors()
    assert expectation(error) == "expected an object"
    return error["type"]


def test_other_texts_keep_their_words():
    error = error_of(bytes, 5)
    assert expectation(error) == "it should be a valid bytes"


def test_a_large_object_is_shown_without_looking_at_all_of_it():
    compared = 0

    class Name(str):
        __slots__ = ()

        def __lt__(self, other):
            nonlocal compared
            compared += 1
            return str(self) < str(other)

    large = {Name(number): [number] for number in range(10_000)}
    assert (
        as_written({"sets": [large]}) == "{'sets': [{'0': [0], '1': [1], '2': [2], '3': [3], ...}]}"
    )
    assert compared < 100
    assert as_written({"b": 1, "a": "x" * 100}) == "{'a': 'xxxxxxxxxxxx...xxxxxxxxxxxxx', 'b': 1}"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (False, "false"),
        (1.0, "1.0"),
        ("a'b", '"a\'b"'),
        ([None, True], "[null, true]"),
        ({"größe": False}, "{'größe': false}"),
        ([[[[[[[[1]]]]]]]], "[[[[[[[...]]]]]]]"),
        (list(range(1000)), "[0, 1, 2, 3, 4, 5, ...]"),
    ],
)
def test_values_are_shown_in_the_words_of_json(value, text):
    assert as_written(value) == text

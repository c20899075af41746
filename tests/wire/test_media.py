import pytest

from bonsai_lora.errors import InvalidRequestError, NotAcceptableError, UnsupportedMediaTypeError
from bonsai_lora.wire.media import Form, answer_form, check_answer_dtype, request_form

TENSORS = (Form.JSON, Form.BINARY)


@pytest.mark.parametrize(
    ("header", "form"),
    [
        (None, Form.JSON),
        ("application/json", Form.JSON),
        ("Application/JSON; charset=utf-8", Form.JSON),
        ("application/vnd.safetensors", Form.BINARY),
        ("application/safetensors", Form.BINARY),
    ],
)
def test_request_form(header, form):
    assert request_form(header, TENSORS) is form


@pytest.mark.parametrize("header", ["text/plain", "application/octet-stream", "", "x" * 1000, ";"])
def test_other_types(header):
    if header == "":
        assert request_form(header, TENSORS) is Form.JSON
        return
    with pytest.raises(UnsupportedMediaTypeError):
        request_form(header, TENSORS)


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        (None, Form.BINARY),
        ("*/*", Form.BINARY),
        ("application/json", Form.JSON),
        ("application/json;q=0.2, application/vnd.safetensors;q=0.1", Form.JSON),
        ("application/vnd.safetensors;q=0, */*", Form.JSON),
        ("text/html, application/*;q=0.1", Form.BINARY),
        ("application/json;q=bad, application/safetensors", Form.BINARY),
    ],
)
def test_answer_form(accept, form):
    assert answer_form(accept, Form.BINARY, TENSORS) is form


def test_nothing_acceptable():
    with pytest.raises(NotAcceptableError):
        answer_form("text/html", Form.JSON, TENSORS)
    with pytest.raises(NotAcceptableError):
        answer_form("*/*;q=0", Form.JSON, TENSORS)


def test_answer_dtypes():
    assert check_answer_dtype(None, Form.JSON) == "F32"
    assert check_answer_dtype("BF16", Form.BINARY) == "BF16"
    for dtype, form in [("F16", Form.JSON), ("F64", Form.BINARY), ("", Form.BINARY)]:
        with pytest.raises(InvalidRequestError):
            check_answer_dtype(dtype, form)

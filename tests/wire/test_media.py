import pytest

from bonsai_lora.errors import InvalidRequestError, NotAcceptableError, UnsupportedMediaTypeError
from bonsai_lora.wire.media import Form, check_response_dtype, negotiate_form, parse_content_type

TENSORS = (Form.JSON, Form.BINARY)


@pytest.mark.parametrize(
    ("header", "form"),
    [
        (None, Form.JSON),
        ("", Form.JSON),
        ("application/json", Form.JSON),
        ("Application/JSON; charset=utf-8", Form.JSON),
        ("application/vnd.safetensors", Form.BINARY),
        ("application/safetensors", Form.BINARY),
    ],
)
def test_content_type(header, form):
    assert parse_content_type(header, TENSORS) is form


@pytest.mark.parametrize("header", ["text/plain", "application/octet-stream", "x" * 1000, ";"])
def test_unsupported_content_types(header):
    with pytest.raises(UnsupportedMediaTypeError):
        parse_content_type(header, TENSORS)


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
def test_accept(accept, form):
    assert negotiate_form(accept, Form.BINARY, TENSORS) is form


def test_nothing_is_acceptable():
    with pytest.raises(NotAcceptableError):
        negotiate_form("text/html", Form.JSON, TENSORS)
    with pytest.raises(NotAcceptableError):
        negotiate_form("*/*;q=0", Form.JSON, TENSORS)


def test_response_dtypes():
    assert check_response_dtype(None, Form.JSON) == "F32"
    assert check_response_dtype("BF16", Form.BINARY) == "BF16"
    for dtype, form in [("F16", Form.JSON), ("F64", Form.BINARY), ("", Form.BINARY)]:
        with pytest.raises(InvalidRequestError):
            check_response_dtype(dtype, form)

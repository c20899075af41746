"""A refusal becomes the error that it stands for, by its code, else by its status."""

import json

import httpx
import numpy as np
import pytest
from scripted import Answer, scripted

from bonsai_lora import Client, errors
from bonsai_lora.api.errors import problem_response, status_of
from bonsai_lora.client.refusals import refusal_of


def kinds(kind=errors.BonsaiLoraError):
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from kinds(child)


def answer_to(error, path="/v1/x"):
    """The service's own answer, as httpx reads it."""
    scope = {"path": path, "request_id": "ab12"}
    response = problem_response(error, scope)
    return httpx.Response(response.status_code, headers=response.headers, content=response.body)


def made(kind):
    error = kind.__new__(kind)
    errors.BonsaiLoraError.__init__(error, "what is wrong", size_bytes=7, got="q_prjo")
    return error


@pytest.mark.parametrize("kind", list(kinds()), ids=lambda kind: kind.__name__)
def test_every_class_comes_back(kind):
    error = refusal_of(answer_to(made(kind)))
    same = (errors.RouteNotFoundError, errors.TooManyFilesError)  # they have their parents' codes
    assert type(error) is (kind.__base__ if kind in same else kind)
    assert error.code == kind.code
    assert error.detail == str(error) == "what is wrong"
    status = int(status_of(kind))
    values = {"status": status, "request_id": "ab12", "size_bytes": 7, "got": "q_prjo"}
    assert error.values == values


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.MalformedBodyError),
        (401, errors.UnauthenticatedError),
        (403, errors.ForbiddenError),
        (404, errors.NotFoundError),
        (409, errors.BonsaiLoraError),
        (412, errors.PreconditionFailedError),
        (413, errors.TooLargeError),
        (422, errors.InvalidError),
        (421, errors.MisdirectedRequestError),
        (429, errors.RateLimitedError),
        (500, errors.InternalError),
        (503, errors.BusyError),
        (507, errors.BonsaiLoraError),
    ],
)
def test_a_code_of_a_newer_service_goes_by_its_status(status, kind):
    body = {"code": "brand_new", "detail": "text", "status": status, "self": 1, "detail_": 2}
    error = refusal_of(httpx.Response(status, json=body))
    assert type(error) is kind
    assert (error.code, error.detail) == ("brand_new", "text")
    assert error.values == {"status": status, "self": 1, "detail_": 2}
    assert kind.code != "brand_new"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.SetNotFoundError("s"), errors.NotFoundError),
        (errors.ShapeMismatchError("text"), errors.InvalidError),
        (errors.UnsupportedFeatureError("text"), errors.UnsupportedFeatureError),
        (errors.BusyError("text"), errors.BusyError),
    ],
)
def test_refusals_of_the_inference_protocol_have_no_code(error, kind):
    assert type(refusal_of(answer_to(error, "/v2/models/s"))) is kind


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"code": 5}', b'"text"'])
def test_an_answer_of_a_proxy(content):
    error = refusal_of(httpx.Response(502, content=content))
    assert type(error) is errors.BonsaiLoraError
    assert (error.code, error.detail) == ("http_502", "the service answered 502 Bad Gateway")
    assert refusal_of(httpx.Response(503, content=content)).code == "http_503"


def test_a_redirect_is_not_a_success(settings):
    with (
        scripted([Answer(301, b"", ("Location: /elsewhere",))]) as server,
        Client(server.url) as client,
        pytest.raises(errors.BonsaiLoraError, match="301 Moved Permanently"),
    ):
        client.delete_set("s")


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b""])
def test_an_answer_of_a_different_service(body):
    calls = [
        lambda client: client.apply("s", "m", [1.0]),
        lambda client: client.list_adapters("s"),
        lambda client: client.infer("s", {"x": [1.0]}),
        lambda client: client.merge("s", "m", np.ones((1, 1), np.float32)),
    ]
    with scripted([Answer(200, body)] * len(calls)) as server, Client(server.url) as client:
        for call in calls:
            with pytest.raises(httpx.DecodingError, match="cannot be decoded"):
                call(client)


def test_a_refused_write_changes_nothing(service):
    with Client(service) as client:
        before = client.create_set("s")
        with pytest.raises(errors.InvalidAdapterError):
            client.upload_tensors("s", {"peft_type": "LORA", "r": 0, "lora_alpha": 1}, {})
        with pytest.raises(errors.MalformedMultipartError):
            client.upload_files("s", {"adapter_config": json.dumps({}).encode()})
        assert client.get_set("s") == before

"""What is sent again and what is not: against a server on a real socket that drops connections."""

import socket
import threading
import time

import httpx
import numpy as np
import pytest
from scripted import DROP, Answer, scripted

from bonsai_lora import Client, errors
from bonsai_lora.formats import safetensors

BUSY = b'{"code": "busy", "detail": "too much at once"}'
STATS = Answer(200, b'{"set_count": 1}')


def busy(*headers, body=BUSY):
    return Answer(503, body, headers)


def test_a_read_is_repeated_if_the_connection_breaks():
    with scripted([DROP, DROP, STATS]) as server, Client(server.url) as client:
        assert client.get_stats() == {"set_count": 1}
    assert len(server.heads) == 3


def test_an_answer_that_is_cut_short_is_read_again():
    cut = STATS._replace(sent=5)
    with scripted([cut, STATS]) as server, Client(server.url) as client:
        assert client.get_stats() == {"set_count": 1}
    assert len(server.heads) == 2


def test_a_key_that_was_too_fast_waits_even_with_a_write():
    slow = Answer(429, b'{"code": "rate_limited", "detail": "wait"}', ("Retry-After: 0",))
    with scripted([slow, Answer(204, b"")]) as server, Client(server.url) as client:
        client.delete_set("s")
    assert len(server.heads) == 2


def test_an_apply_is_repeated_with_the_same_body():
    metadata = {"set": "s", "version": "1"}
    body = safetensors.encode({"outputs": np.ones((1, 2), np.float32)}, metadata)
    steps = [busy("Retry-After: 0"), DROP, Answer(200, body)]
    with scripted(steps) as server, Client(server.url) as client:
        assert client.apply("s", "m", np.ones((1, 2))).outputs.tolist() == [[1.0, 1.0]]
    assert server.bodies[0] == server.bodies[1] != b""


def test_a_merge_of_a_matrix_is_repeated_from_its_start():
    w = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    body = safetensors.encode({"weights": w})
    steps = [busy("Retry-After: 0"), Answer(200, body)]
    with scripted(steps) as server, Client(server.url) as client:
        assert np.array_equal(client.merge("s", "m", w), w)
    assert server.bodies == [body, body]


def test_a_broken_connection_is_given_up_after_so_many_attempts():
    with scripted([DROP] * 4) as server, Client(server.url, retries=3) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.get_stats()
        assert len(server.heads) == 4
    with scripted([DROP]) as server, Client(server.url, retries=0) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.get_stats()
        assert len(server.heads) == 1


WRITES = [
    lambda client: client.create_set("s"),
    lambda client: client.upload_files("s", {"adapter_config": b"{}", "adapter_model": b""}),
    lambda client: client.put_adapter("s", "m", 1, 1),
    lambda client: client.put_weights("s", "m", np.ones((1, 1)), np.ones((1, 1))),
    lambda client: client.delete_adapter("s", "m"),
    lambda client: client.delete_set("s"),
]


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_never_sent_twice_over_a_broken_connection(write):
    with scripted([DROP, STATS]) as server, Client(server.url, retries=5) as client:
        with pytest.raises(httpx.TransportError):
            write(client)
        assert len(server.heads) == 1


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_repeated_if_the_service_says_that_it_did_not_begin(write):
    with scripted([busy("Retry-After: 0"), STATS]) as server, Client(server.url) as client:
        write(client)
        assert len(server.heads) == 2


@pytest.mark.parametrize(
    "answer",
    [
        busy(),
        busy("Retry-After: 0", body=b"<html>a gateway that may have passed it on"),
        busy("Retry-After: 0", body=b'{"code": "store_read_only", "detail": ""}'),
        busy("Retry-After: 0", body=b'{"code": "a_new_one", "detail": ""}'),
        busy("Retry-After: 3600"),
        busy(f"Retry-After: {'9' * 5000}"),
        busy("Retry-After: Wed, 21 Oct 2026 07:28:00 GMT"),
        busy("Retry-After: -1"),
        Answer(500, b'{"code": "internal_error", "detail": ""}', ("Retry-After: 0",)),
    ],
)
def test_a_write_is_not_repeated_after_other_refusals(answer):
    with scripted([answer, STATS]) as server, Client(server.url) as client:
        with pytest.raises(errors.BonsaiLoraError):
            client.create_set("s")
        assert len(server.heads) == 1


def test_a_read_waits_as_long_as_the_service_asks():
    steps = [busy("Retry-After: 1", body=b"from a proxy"), STATS]
    started = time.monotonic()
    with scripted(steps) as server, Client(server.url) as client:
        assert client.get_stats()["set_count"] == 1
    assert time.monotonic() - started >= 1


def test_a_set_of_a_newer_release_stays_so():
    body = b'{"code": "newer_format", "detail": "text"}'
    with scripted([busy("Retry-After: 0", body=body)]) as server, Client(server.url) as client:
        with pytest.raises(errors.NewerFormatError):
            client.get_set("s")
        assert len(server.heads) == 1


def test_what_can_be_read_once_is_sent_once(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"model")
    with scripted([busy("Retry-After: 0"), STATS]) as server, Client(server.url) as client:
        with pytest.raises(errors.BusyError), path.open("rb") as file:
            client.upload_files("s", {"adapter_config": b"{}", "adapter_model": file})
        assert len(server.heads) == 1
    with scripted([busy("Retry-After: 0"), STATS]) as server, Client(server.url) as client:
        client.upload_files("s", {"adapter_config": b"{}", "adapter_model": path})
        assert [body.count(b"model\r\n") for body in server.bodies] == [1, 1]
    with scripted([DROP, STATS]) as server, Client(server.url) as client:
        with pytest.raises(httpx.TransportError):
            list(client.merge_stream("s", "m", iter([b"1234"]), dtype="F32"))
        assert len(server.heads) == 1


def test_a_refused_connection_is_tried_again_even_for_a_write():
    """Nothing was sent: the service starts while the client waits."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def serve():
        time.sleep(0.05)
        listener.listen()
        connection, _ = listener.accept()
        with connection:
            received.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    received = []
    thread = threading.Thread(target=serve)
    thread.start()
    with Client(url) as client:
        client.delete_set("s")
    thread.join()
    listener.close()
    assert len(received) == 1
    with Client(url) as client, pytest.raises(httpx.ConnectError):
        client.get_stats()


def test_a_service_that_does_not_answer_in_time():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with Client(url, timeout=0.1) as client, pytest.raises(httpx.ReadTimeout):
            client.get_stats()
        assert time.monotonic() - started < 2

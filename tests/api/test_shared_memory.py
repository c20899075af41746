"""Tensors through system shared memory, with NVIDIA's own client and with hostile ones."""

import contextlib
import os
import secrets
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.utils.shared_memory as shm
from conftest import TINY, read_tensors, serving, upload
from pydantic import ValidationError
from test_apply import DOWN, Q_PROJ
from test_oip import error_of, exact, names, refused, tensor

from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings
from bonsai_lora.storage.regions import SHARED_MEMORY, SharedRegions


@pytest.fixture
def local(settings):
    """A service with shared memory, with the set `plain`: an HTTP client and a tritonclient."""
    app = create_app(settings.model_copy(update={"shared_memory": True}))
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        upload(client, "plain", TINY / "plain")
        with triton.InferenceServerClient(url.removeprefix("http://")) as server:
            yield client, server


@contextlib.contextmanager
def memory(byte_size):
    """A tritonclient region of its own, with its key."""
    key = f"/bonsai-test-{secrets.token_hex(8)}"
    handle = shm.create_shared_memory_region("data", key, byte_size)
    try:
        yield handle, key
    finally:
        shm.destroy_shared_memory_region(handle)


def placed(name, array, region, offset=0, datatype="FP32"):
    made = triton.InferInput(name, list(array.shape), datatype)
    return made.set_shared_memory(region, array.nbytes, offset)


def output(name, region, byte_size, offset=0):
    made = triton.InferRequestedOutput(name)
    made.set_shared_memory(region, byte_size, offset)
    return made


def test_in_and_out_through_shared_memory(local):
    client, server = local
    golden = read_tensors(TINY / "plain" / "golden.safetensors")
    x, wide = golden[f"{Q_PROJ}.x"], golden[f"{DOWN}.x"]
    size = 4 * 5 * 128
    with memory(x.nbytes + wide.nbytes) as (source, key), memory(3 * size) as (target, other):
        shm.set_shared_memory_region(source, [x, wide])
        server.register_system_shared_memory("in", key, x.nbytes + wide.nbytes)
        server.register_system_shared_memory("out", other, 2 * size, offset=size)
        assert "system_shared_memory" in server.get_server_metadata()["extensions"]
        status = server.get_system_shared_memory_status()
        assert [(one["name"], one["key"], one["offset"]) for one in status] == [
            ("in", key, 0),
            ("out", other, size),
        ]
        assert server.get_system_shared_memory_status("out") == status[1:]
        inputs = [placed(Q_PROJ, x, "in"), placed(DOWN, wide, "in", x.nbytes)]
        outputs = [output(Q_PROJ, "out", size), output(DOWN, "out", 5 * 64 * 4, offset=size)]
        result = server.infer("plain", inputs, outputs=outputs)
        for module, array, offset in ((Q_PROJ, x, size), (DOWN, wide, 2 * size)):
            about = result.get_output(module)
            assert "data" not in about
            assert about["parameters"]["shared_memory_region"] == "out"
            got = shm.get_contents_as_numpy(target, np.float32, about["shape"], offset)
            assert np.array_equal(got, exact(client, module, array))
        half = server.infer("plain", [placed(Q_PROJ, x, "in")])
        assert np.array_equal(half.as_numpy(Q_PROJ), exact(client, Q_PROJ, x))
        server.unregister_system_shared_memory("in")
        server.unregister_system_shared_memory("in")
        refused(lambda: server.infer("plain", inputs), 404, "Unable to find shared memory region")
        server.unregister_system_shared_memory()
        assert server.get_system_shared_memory_status() == []
        assert (SHARED_MEMORY / key[1:]).exists()
        assert (SHARED_MEMORY / other[1:]).exists()


def test_half_precision_and_names_through_shared_memory(local):
    client, server = local
    x = np.linspace(-1, 1, 128, dtype=np.float16).reshape(2, 64)
    sets = triton.InferInput("sets", [2], "BYTES").set_data_from_numpy(names("plain", ""))
    raw = np.frombuffer(sets._get_binary_data(), np.uint8)
    with memory(4096) as (handle, key):
        server.register_system_shared_memory("r", key, 4096)
        shm.set_shared_memory_region(handle, [x, raw])
        inputs = [
            placed(Q_PROJ, x, "r", datatype="FP16"),
            triton.InferInput("sets", [2], "BYTES").set_shared_memory("r", len(raw), x.nbytes),
        ]
        got = server.infer("mixed", inputs).as_numpy(Q_PROJ)
        assert np.array_equal(got[0], exact(client, Q_PROJ, x[:1])[0])
        assert not got[1].any()


def test_input_and_output_may_be_the_same_bytes(local):
    client, server = local
    x = np.ones((2, 64), np.float32)
    with memory(1024) as (handle, key):
        shm.set_shared_memory_region(handle, [x])
        server.register_system_shared_memory("r", key, 1024)
        server.infer("plain", [placed(Q_PROJ, x, "r")], outputs=[output(Q_PROJ, "r", 1024)])
        got = shm.get_contents_as_numpy(handle, np.float32, [2, 128])
        assert np.array_equal(got, exact(client, Q_PROJ, x))


def test_invalid_sizes_and_offsets_are_refused(local):
    _, server = local
    x = np.ones((1, 64), np.float32)
    with memory(1024) as (handle, key):
        register = server.register_system_shared_memory
        refused(lambda: register("r", key, 1025), 400, "1024 bytes")
        refused(lambda: register("r", key, 1024, offset=1), 400, "1024 bytes")
        refused(lambda: register("r", key, 2**63), 400, "byte_size")
        refused(lambda: register("r", key, -1), 400, "byte_size")
        refused(lambda: register("r", key, 0), 400, "byte_size")
        refused(lambda: register("r", key, 8, offset=-8), 400, "offset")
        refused(lambda: register("r", key, 8, offset=2**62 - 1), 400, "1024 bytes")
        register("r", key, 512, offset=256)
        refused(lambda: register("r", key, 512), 400, "already in manager")
        shm.set_shared_memory_region(handle, [x], offset=256)
        for size, offset, words in (
            (256, 257, "Invalid offset"),
            (513, 0, "Expected 256"),
            (256, 2**62, "Invalid offset"),
            (252, 0, "Expected 256"),
            (260, 0, "Expected 256"),
        ):
            placed_so = triton.InferInput(Q_PROJ, [1, 64], "FP32")
            placed_so.set_shared_memory("r", size, offset)
            refused(lambda one=placed_so: server.infer("plain", [one]), 400, words)
        good = [placed(Q_PROJ, x, "r")]
        before = bytes(handle._mpsm_handle.buf)
        for outputs, words in (
            ([output(Q_PROJ, "r", 511)], "at least 512 bytes"),
            ([output(Q_PROJ, "r", 512, offset=4)], "Invalid offset"),
            ([output(Q_PROJ, "nobody", 512)], "Unable to find"),
        ):
            status = 404 if "find" in words else 400
            refused(lambda o=outputs: server.infer("plain", good, outputs=o), status, words)
        assert bytes(handle._mpsm_handle.buf) == before


def test_nothing_is_read_before_its_size_is_known(local):
    """A sparse region of gigabytes costs its client nothing; it must cost the server nothing."""
    _, server = local
    path = SHARED_MEMORY / f"bonsai-test-{secrets.token_hex(8)}"
    path.touch()
    try:
        os.truncate(path, 1 << 33)
        server.register_system_shared_memory("r", path.name, 1 << 33)
        for shape, words in (
            ([1, 64], "the limit is 67108864"),
            ([1 << 25, 64], "the limit is 67108864"),
        ):
            given = triton.InferInput(Q_PROJ, shape, "FP32").set_shared_memory("r", 1 << 33)
            refused(lambda one=given: server.infer("plain", [one]), 400, words)
        given = triton.InferInput(Q_PROJ, [1, 64], "FP32").set_shared_memory("r", 1 << 20)
        refused(lambda: server.infer("plain", [given]), 400, "Expected 256")
        rows = triton.InferInput(Q_PROJ, [1 << 17, 64], "FP32").set_shared_memory("r", 1 << 25)
        refused(lambda: server.infer("plain", [rows]), 400, "131072 rows")
    finally:
        path.unlink()


def test_memory_may_be_unlinked_once_it_is_registered(local):
    client, server = local
    x = np.ones((1, 64), np.float32)
    with memory(256) as (handle, key):
        shm.set_shared_memory_region(handle, [x])
        server.register_system_shared_memory("r", key, 256)
    got = server.infer("plain", [placed(Q_PROJ, x, "r")]).as_numpy(Q_PROJ)
    assert np.array_equal(got, exact(client, Q_PROJ, x))


def test_overlapping_outputs_are_refused(local):
    _, server = local
    k_proj = Q_PROJ.replace("q_proj", "k_proj")
    v_proj = Q_PROJ.replace("q_proj", "v_proj")
    with memory(4096) as (_, key):
        server.register_system_shared_memory("r", key, 4096)
        server.register_system_shared_memory("same", key, 4096)
        x = tensor("x", np.ones((1, 64), np.float32))
        widths = {
            one["name"]: one["shape"][1] for one in server.get_model_metadata("plain")["outputs"]
        }
        size = 4 * widths[k_proj]
        for region in ("r", "same"):
            outputs = [output(k_proj, "r", size), output(v_proj, region, size, offset=size - 4)]
            refused(lambda o=outputs: server.infer("plain", [x], outputs=o), 400, "overlap")
        outputs = [output(k_proj, "r", 4096), output(v_proj, "same", size, offset=size)]
        server.infer("plain", [x], outputs=outputs)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        ".",
        "..",
        "/..",
        "../etc/passwd",
        "/a/b",
        "a b",
        "a\0b",
        "sem.x",
        "k" * 251,
        "ü",
        "//x",
    ],
)
def test_invalid_keys_are_refused(local, key):
    client, _ = local
    body = {"key": key, "offset": 0, "byte_size": 4}
    answer = client.post("/v2/systemsharedmemory/region/r/register", json=body)
    error_of(answer, 400, "Unable to open shared memory region")


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "nothing"])
def test_files_that_are_no_shared_memory(local, tmp_path, kind):
    client, _ = local
    path = SHARED_MEMORY / f"bonsai-test-{secrets.token_hex(8)}"
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4096))
    make = {
        "link": lambda: path.symlink_to(secret),
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "nothing": lambda: None,
    }
    make[kind]()
    try:
        body = {"key": path.name, "offset": 0, "byte_size": 4}
        answer = client.post("/v2/systemsharedmemory/region/r/register", json=body)
        error_of(answer, 400, "Unable to open shared memory region")
    finally:
        if kind == "folder":
            path.rmdir()
        else:
            path.unlink(missing_ok=True)


def test_a_region_that_shrinks_is_an_error_not_a_crash(local):
    _, server = local
    x = np.ones((1, 64), np.float32)
    path = SHARED_MEMORY / f"bonsai-test-{secrets.token_hex(8)}"
    path.write_bytes(bytes(1 << 16))
    try:
        server.register_system_shared_memory("r", path.name, 1 << 16)
        far = placed(Q_PROJ, x, "r", offset=1 << 15)
        assert server.infer("plain", [far]) is not None
        os.truncate(path, 4096)
        refused(lambda: server.infer("plain", [far]), 400, "4096 bytes")
        outputs = [output(Q_PROJ, "r", 512, offset=1 << 15)]
        near = placed(Q_PROJ, x, "r")
        refused(lambda: server.infer("plain", [near], outputs=outputs), 400, "4096 bytes")
        assert path.stat().st_size == 4096
        assert server.infer("plain", [near]) is not None
    finally:
        path.unlink()
    assert server.infer("plain", [near]) is not None  # as with a mapping, the bytes are still there
    server.unregister_system_shared_memory("r")


def test_a_replaced_file_is_not_opened_by_other_workers(tmp_path):
    one, other = SharedRegions(tmp_path), SharedRegions(tmp_path)
    from bonsai_lora.errors import InvalidRequestError, RegionNotFoundError
    from bonsai_lora.wire.oip import Placement

    path = SHARED_MEMORY / f"bonsai-test-{secrets.token_hex(8)}"
    path.write_bytes(b"first")
    try:
        one.register("r", path.name, 0, 5)
        assert bytes(other.read(Placement("r", 1, 3))) == b"irs"
        other.write(Placement("r", 0, 2), memoryview(b"FI"))
        assert path.read_bytes() == b"FIrst"
        replaced = path.with_name(f"{path.name}-new")
        replaced.write_bytes(b"other")
        third = SharedRegions(tmp_path)
        replaced.rename(path)
        with pytest.raises(InvalidRequestError, match="has been replaced"):
            third.read(Placement("r", 0, 5))
        other.unregister("r")
        with pytest.raises(RegionNotFoundError):
            one.read(Placement("r", 0, 5))
        one.register("r", path.name, 0, 5)
        assert bytes(other.read(Placement("r", 0, 5))) == b"other"
    finally:
        path.unlink()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "example.org"])
def test_shared_memory_only_on_the_loopback(host):
    with pytest.raises(ValidationError, match="loopback"):
        Settings(host=host, shared_memory=True)
    for allowed in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        assert Settings(host=allowed, shared_memory=True).shared_memory


def test_descriptors_are_closed(local):
    client, server = local
    before = len(os.listdir("/proc/self/fd"))
    x = np.ones((1, 64), np.float32)
    for number in range(20):
        with memory(1024) as (_, key):
            server.register_system_shared_memory(f"r{number}", key, 1024)
            server.infer("plain", [placed(Q_PROJ, x, f"r{number}")])
            server.unregister_system_shared_memory(f"r{number}")
    assert len(os.listdir("/proc/self/fd")) < before + 10
    assert not list(Path("/dev/shm").glob("bonsai-test-*"))
    assert client.get("/v2/systemsharedmemory/status").json() == []


def test_a_refusal_leaves_shared_memory_as_it_was(local):
    _, server = local
    k_proj = Q_PROJ.replace("q_proj", "k_proj")
    size = 4 * 128
    with memory(4096) as (handle, key):
        server.register_system_shared_memory("r", key, 4096)
        x = np.ones((1, 64), np.float32)
        before = bytes(handle._mpsm_handle.buf)
        beyond = [output(Q_PROJ, "r", size), output(k_proj, "r", 1 << 20, offset=size)]
        refused(lambda: server.infer("plain", [tensor("x", x)], outputs=beyond), 400, "offset")
        huge = np.full((1, 64), 3e38, np.float32)
        half = [output(Q_PROJ, "r", size), triton.InferRequestedOutput(k_proj, binary_data=False)]
        refused(lambda: server.infer("plain", [tensor("x", huge)], outputs=half), 400, "overflows")
        assert bytes(handle._mpsm_handle.buf) == before

"""Every error's text, as the service produces it: first what is wrong, then what to do.

tests/data/error_texts.txt has all of them, to be read from top to bottom. After a change of a text,
`python tests/test_error_texts.py` writes it again.
"""

import ast
import contextlib
import errno
import inspect
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import (
    DATA,
    TINY,
    peft_config,
    peft_tensors,
    serving,
    upload,
    upload_parts,
)
from keyring import KeysFileMaker, caller
from obstore.store import S3Store

from bonsai_lora import errors
from bonsai_lora.api.app import create_app
from bonsai_lora.api.errors import failure_response, is_oip, status_of
from bonsai_lora.checkpoints.bases import BaseFolder
from bonsai_lora.checkpoints.merged import Ingredient, MergedModel
from bonsai_lora.checkpoints.merged_files import merged_files
from bonsai_lora.core.config import LoraConfig
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.formats import gguf, gguf_writer, safetensors
from bonsai_lora.formats.dequantize import dequantize
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.settings import Settings
from bonsai_lora.storage.bucket import Bucket
from bonsai_lora.storage.regions import SharedRegions
from bonsai_lora.wire.media import Form

GOLDEN = DATA / "error_texts.txt"
Q_PROJ = "model.layers.0.self_attn.q_proj"
APPLY = f"/v1/sets/plain/adapters/{Q_PROJ}/apply"
MERGE = f"/v1/sets/plain/adapters/{Q_PROJ}/merge"
BINARY = {"Content-Type": Form.BINARY}
RAW = {"Content-Type": Form.RAW}
ROW = [0.0] * 64

FORGED = "size=1&key=anyone&expires=0&signature=0"
VERBS = frozenset(
    re.findall(
        r"\w+",
        "accept add apply choose delete DELETE expected fetch free GET give it look lower merge name raise"
        " register remove request retry save see send split start upgrade use",
    )
)
"""First words of what to do. `expected …` and `it should …` describe what to send instead."""

PACKAGE = Path(errors.__file__).parent
FOLDERS = ("api", "cli", "fast_lane", "service", "sources", "storage", "wire")
OF_TRITON = (
    "unexpected shape for input",
    "input byte size mismatch",
    "should be at least",
    "Please use the binary data format",
)
"""Texts that Triton's clients search for have Triton's wording."""

REQUESTS = [
    (errors.JobNotFoundError, "GET", "/v1/jobs/0000000000000000000000000000", {}),
    (
        errors.MalformedBodyError,
        "POST",
        f"{MERGE}?dtype=F32",
        {"content": [b"abcd"], "headers": RAW},
    ),
    (errors.MalformedJsonError, "POST", APPLY, {"content": b"{"}),
    (errors.MalformedJsonError, "POST", "/v1/sets", {"content": b"{"}),
    (errors.MalformedMultipartError, "PUT", "/v1/sets/new", {"files": {"adapter_config": b"{}"}}),
    (errors.MalformedMultipartError, "PUT", "/v1/sets/new", {"files": {"adapter": b"{}"}}),
    (errors.MalformedSafetensorsError, "POST", APPLY, {"content": b"abcd", "headers": BINARY}),
    (errors.SetNotFoundError, "GET", "/v1/sets/other", {}),
    (errors.AdapterNotFoundError, "GET", "/v1/sets/plain/adapters/lm_head", {}),
    (errors.AdapterNotFoundError, "GET", "/v1/sets/empty/adapters/lm_head", {}),
    (errors.BaseNotFoundError, "GET", "/v1/bases/other", {}),
    (errors.FileNotInModelError, "GET", "/v1/bases/tiny-qwen3/merged/plain/other.json", {}),
    (errors.UnmergeableError, "GET", "/tiny-qwen3/other-model/resolve/main/config.json", {}),
    (errors.VersionNotFoundError, "GET", "/v2/models/plain/versions/9", {}),
    (errors.RouteNotFoundError, "GET", "/other", {}),
    (errors.RouteNotFoundError, "GET", "/v1/sets/", {}),
    (errors.RouteNotFoundError, "GET", "/api/models/my-set", {}),
    (errors.RouteNotFoundError, "POST", "/api/models/my-set/preupload/main", {"json": {}}),
    (errors.RouteNotFoundError, "POST", "/api/models/adapters/plain/discussions", {"json": {}}),
    (errors.RouteNotFoundError, "DELETE", "/api/repos/delete", {}),
    (errors.RouteNotFoundError, "GET", "/v1/v1/sets", {}),
    (errors.RouteNotFoundError, "POST", "/v1/chat/completions", {"json": {}}),
    (errors.MethodNotAllowedError, "PATCH", "/v1/sets", {}),
    (
        errors.NotAcceptableError,
        "POST",
        APPLY,
        {"json": {"inputs": [ROW]}, "headers": {"Accept": "text/plain"}},
    ),
    (errors.SetExistsError, "POST", "/v1/sets", {"json": {"name": "plain"}}),
    (
        errors.PreconditionFailedError,
        "DELETE",
        f"/v1/sets/plain/adapters/{Q_PROJ}",
        {"headers": {"If-Match": '"1"'}},
    ),
    (errors.BodyTooLargeError, "POST", APPLY, {"json": {"inputs": [[1e-30] * 999]}}),
    (
        errors.InvalidRequestError,
        "POST",
        "/v1/combine",
        {"json": {"name": "new", "sets": [{"set": "plain"}], "rank": 3}},
    ),
    (
        errors.InvalidRequestError,
        "POST",
        "/v1/combine",
        {"json": {"name": "new", "sets": [{"set": "plain"}], "method": "ties"}},
    ),
    (
        errors.InvalidRequestError,
        "POST",
        "/v1/combine",
        {"json": {"name": "new", "sets": [{"set": "plain"}], "method": "slerp"}},
    ),
    (
        errors.HeaderTooLargeError,
        "POST",
        APPLY,
        {"content": (1 << 20).to_bytes(8, "little"), "headers": BINARY},
    ),
    (errors.HeadTooLargeError, "GET", "/v1/sets", {"headers": {"X-Long": "x" * 70_000}}),
    (errors.MalformedRequestError, "GET", "/v1/sets", {"headers": {"Host": "a b"}}),
    (errors.TooManyRowsError, "POST", APPLY, {"json": {"inputs": [ROW] * 9}}),
    (errors.AnswerTooLargeError, "POST", APPLY, {"json": {"inputs": [ROW] * 8}}),
    (
        errors.UnsupportedMediaTypeError,
        "POST",
        APPLY,
        {"content": b"{}", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    ),
    (
        errors.UnsupportedMediaTypeError,
        "POST",
        APPLY,
        {"json": {}, "headers": {"Content-Encoding": "br"}},
    ),
    (errors.UnsupportedMediaTypeError, "POST", "/v1/sets", {"data": {"name": "n"}}),
    (errors.UnsupportedMediaTypeError, "PUT", "/v1/sets/n", {"content": b"abcd"}),
    (
        errors.UnsupportedMediaTypeError,
        "PUT",
        "/v1/sets/n",
        {"content": b"abcd", "headers": {"Content-Type": "multipart/form-data"}},
    ),
    (
        errors.RangeNotSatisfiableError,
        "GET",
        "/v1/bases/tiny-qwen3/merged/plain/model.safetensors.index.json",
        {"headers": {"Range": "bytes=99999-"}},
    ),
    (errors.InvalidRequestError, "POST", APPLY, {"json": {}}),
    (errors.InvalidRequestError, "POST", APPLY, {"json": {"input": [ROW]}}),
    (errors.InvalidRequestError, "POST", APPLY, {"json": {"inputs": "abc"}}),
    (errors.InvalidRequestError, "POST", APPLY, {"json": {"inputs": [[1.0, None]]}}),
    (errors.InvalidRequestError, "POST", f"{APPLY}?scale=x", {"json": {"inputs": [ROW]}}),
    (errors.InvalidRequestError, "POST", f"{APPLY}?dtype=F16", {"json": {"inputs": [ROW]}}),
    (errors.InvalidRequestError, "GET", "/v1/sets?page=1", {}),
    (errors.InvalidRequestError, "GET", "/v1/bases?page=1", {}),
    (errors.InvalidRequestError, "GET", "/v1/compare?sets=a", {}),
    (errors.InvalidRequestError, "GET", "/v1/sets?limit=ten", {}),
    (errors.InvalidRequestError, "POST", "/v1/sets", {"json": {}}),
    (errors.InvalidRequestError, "POST", "/v1/sets", {"json": {"nam": "n"}}),
    (
        errors.InvalidRequestError,
        "POST",
        "/v1/sets",
        {"json": {"name": "n", "config": {"rank": -1}}},
    ),
    (errors.InvalidRequestError, "POST", "/v1/sets", {"json": {"name": "n", "model": "other"}}),
    (errors.InvalidNameError, "POST", "/v1/sets", {"json": {"name": "a b"}}),
    (errors.InvalidNameError, "POST", "/v1/sets", {"json": {"name": "mixed"}}),
    (errors.ShapeMismatchError, "POST", APPLY, {"json": {"inputs": [1.0, 2.0]}}),
    (
        errors.ShapeMismatchError,
        "POST",
        "/v1/apply",
        {"json": {"module": Q_PROJ, "sets": ["plain"] * 2, "inputs": [ROW] * 3}},
    ),
    (errors.NonFiniteInputError, "POST", APPLY, {"content": b'{"inputs": [[0, NaN]]}'}),
    (errors.NonFiniteOutputError, "POST", f"{APPLY}?scale=1e6", {"json": {"inputs": [3e38] * 64}}),
    (errors.RaggedInputError, "POST", APPLY, {"json": {"inputs": [[1.0, 2.0, 3.0], [4.0, 5.0]]}}),
    (errors.RankTooLargeError, "POST", "/v1/sets", {"json": {"name": "n", "config": {"rank": 65}}}),
    (
        errors.DoraNeedsBaseError,
        "POST",
        APPLY.replace("plain", "dora"),
        {"json": {"inputs": [ROW]}},
    ),
    (errors.InvalidBaseError, "GET", "/v1/bases/broken", {}),
    (
        errors.UnsupportedAdapterError,
        "POST",
        "/v1/apply",
        {"json": {"module": Q_PROJ, "sets": [["dora", "plain"]], "inputs": [ROW]}},
    ),
    (
        errors.MemoryBudgetError,
        "POST",
        "/v1/sets",
        {"json": {"name": "n", "mlp": {"hidden_size": 9999, "intermediate_size": 9999}}},
    ),
    (
        errors.MemoryBudgetError,
        "POST",
        "/v1/sets",
        {"json": {"name": "n", "mlp": {"hidden_size": 2000, "intermediate_size": 2000}}},
    ),
    (
        errors.TooManyModulesError,
        "POST",
        "/v1/sets",
        {"json": {"name": "n", "mlp": {"hidden_size": 4, "intermediate_size": 4}, "num_layers": 9}},
    ),
    (errors.UnsupportedFeatureError, "GET", "/v2/systemsharedmemory/status", {}),
]

GGUF = [
    (errors.MalformedGgufError, gguf.read_header, gguf.reader_of(b"GGML"), 4),
    (errors.UnsupportedGgufError, dequantize, BY_NAME["IQ2_XS"], bytes(74)),
    (
        errors.UnsupportedGgufError,
        gguf_writer.plan,
        {},
        {"blk.0.attn_q.weight": (BY_NAME["Q8_0"], (8, 40))},
    ),
]


def leaves():
    """The error classes that are raised, in the order of the module."""
    found = [one for _, one in inspect.getmembers(errors, inspect.isclass)]
    kinds = [one for one in found if issubclass(one, errors.BonsaiLoraError)]
    parents = {parent for one in kinds for parent in one.__mro__[1:]}
    raised = {errors.MalformedBodyError, errors.ForbiddenError, errors.BusyError}
    return sorted((set(kinds) - parents) | raised, key=line_of)


def line_of(kind):
    return inspect.getsourcelines(kind)[1]


def produce(folder):
    """Return {class: its texts} from a running service."""
    texts = {kind: [] for kind in leaves()}
    shutil.copytree(TINY / "base", folder / "bases" / "tiny-qwen3")
    (folder / "bases" / "broken").mkdir()
    (folder / "bases" / "broken" / "model.safetensors").write_bytes(b"abcd")
    settings = Settings(
        store=str(folder / "store"),
        bases=str(folder / "bases"),
        max_json_bytes=4096,
        max_header_bytes=65536,
        max_answer_bytes=2048,
        max_rows=8,
        max_rank=64,
        max_modules=16,
        work_memory_bytes=300_000,
        max_concurrency=2,
        memory_budget_bytes=1_000_000,
        stall_seconds=0.3,
    )
    app = create_app(settings)
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert upload(client, "plain", TINY / "plain").status_code == 201
        assert upload(client, "dora", TINY / "dora").status_code == 201
        assert client.post("/v1/sets", json={"name": "empty"}).status_code == 201
        client.post("/v1/sets", json={"name": "other-model"})
        client.put(f"/v1/sets/other-model/adapters/{Q_PROJ}", json={"d_in": 5, "d_out": 7})
        for kind, method, path, options in REQUESTS:
            texts[kind].append(text_of(client.request(method, path, **options), kind, path))
        for kind, answer in uploads(client):
            texts[kind].append(text_of(answer, kind, "/v1"))
        with app.state.context.short.admit(), app.state.context.short.admit():
            answer = client.post(APPLY, json={"inputs": [ROW]})
            texts[errors.BusyError].append(text_of(answer, errors.BusyError, APPLY))
        forged = client.put(f"/adapters/plain.git/info/lfs/objects/{'0' * 64}?{FORGED}")
        texts[errors.LinkRefusedError].append(forged.json()["message"])
        texts[errors.StalledError].append(stalled(url))
        app.state.context.stopping.set()
        answer = client.get("/readyz")
        texts[errors.ShuttingDownError].append(text_of(answer, errors.ShuttingDownError, "/readyz"))
        for kind, number in (
            (errors.StoreFullError, errno.ENOSPC),
            (errors.StoreReadOnlyError, errno.EROFS),
            (errors.TooManyFilesError, errno.EMFILE),
        ):
            with failing_fsync(number):
                answer = client.post("/v1/sets", json={"name": "n"})
            texts[kind].append(text_of(answer, kind, "/v1/sets"))
    for kind, answer in at_the_door(folder, settings):
        texts[kind].append(text_of(answer, kind, "/v1"))
    texts[errors.RegionNotFoundError].append(
        raised(errors.RegionNotFoundError, SharedRegions(folder / "regions").get, "other")
    )
    for kind, *arguments in GGUF:
        texts[kind].append(raised(kind, *arguments))
    texts[errors.BaseChangedError].append(base_changed(folder / "changed"))
    texts[errors.StoreUnreachableError].append(
        raised(errors.StoreUnreachableError, Bucket(nowhere()).get, "sets/plain")
    )
    texts[errors.NewerFormatError].append(errors.NewerFormatError("plain", 2, 1).detail)
    texts[errors.JobInterruptedError].append(errors.JobInterruptedError().detail)
    failure = failure_response({"path": "/v1/sets", "request_id": "1"})
    texts[errors.InternalError].append(json.loads(failure.body)["detail"])
    return texts


def text_of(answer, kind, path):
    assert answer.status_code == status_of(kind), answer.text
    body = answer.json()
    if is_oip(path):
        return body["error"]
    assert body["code"] == kind.code, body
    return re.sub(r'"[0-9a-f]{16}-1"', '"0123456789abcdef-1"', body["detail"])


def uploads(client):
    rng = np.random.default_rng(7)
    yield (
        errors.InvalidAdapterError,
        upload_parts(client, "n", peft_config(bias="some"), peft_tensors(rng)),
    )
    wide = {name: one.astype(np.float64) for name, one in peft_tensors(rng).items()}
    yield errors.UnsupportedAdapterError, upload_parts(client, "n", peft_config(), wide)


def at_the_door(folder, settings):
    """Refusals of browsers, and of keys."""
    with serving(create_app(settings)) as url:
        evil = httpx.delete(f"{url}/v1/sets/plain", headers={"Origin": "https://evil.example"})
        yield errors.CrossSiteError, evil
        evil = httpx.get(f"{url}/v1/sets", headers={"Host": "evil.example"})
        yield errors.MisdirectedRequestError, evil
    yield from of_sources(folder, settings)
    yield from of_engines(folder, settings)
    made = KeysFileMaker(folder / "keys.json")
    key = made.add(number="k3f9a2b1", limits={"requests_per_second": 0.25})
    full = made.add(number="k3f9a2b2", quota={"sets": 1})
    reader = made.add(["read"], number="k3f9a2b3")
    with serving(create_app(settings.model_copy(update={"keys_file": made.path}))) as url:
        yield errors.UnauthenticatedError, httpx.get(f"{url}/v1/sets")
        with caller(url, key) as client:
            yield errors.NameNotYoursError, client.delete("/v1/sets/plain")
            yield errors.RateLimitedError, client.get("/v1/sets")
        with caller(url, full) as client:
            client.post("/v1/sets", json={"name": "acme.a"})
            yield errors.QuotaExceededError, client.post("/v1/sets", json={"name": "acme.b"})
        with caller(url, reader) as client:
            yield errors.ForbiddenError, client.post("/v1/sets", json={"name": "acme.b"})


def of_sources(folder, settings):
    """Refusals of pulls."""
    closed = {"url": "http://127.0.0.1:9", "allow_private": True, "allow_http": True}
    origins = [
        {"name": "drop", "kind": "file", "path": str(folder)},
        {"name": "files", "kind": "https", **closed},
        {"name": "inside", "kind": "https", **closed, "allow_private": False},
    ]
    path = folder / "sources.json"
    path.write_text(json.dumps({"sources": origins}))
    for source, kind in (
        ("drop:nothing", errors.SourcesOffError),
        ("other:nothing", errors.SourceUnknownError),
        ("drop:nothing", errors.SourceRefusedError),
        ("inside:nothing", errors.SourceRefusedError),
        ("files:nothing", errors.SourceUnreachableError),
    ):
        sources = None if kind is errors.SourcesOffError else path
        with serving(create_app(settings.model_copy(update={"sources": sources}))) as url:
            yield kind, httpx.put(f"{url}/v1/sets/pulled", json={"source": source})


def of_engines(folder, settings):
    """Refusals in the words of engines."""
    origins = [{"name": "drop", "kind": "file", "path": str(TINY)}]
    path = folder / "engines.json"
    path.write_text(json.dumps({"sources": origins}))
    with serving(create_app(settings.model_copy(update={"sources": path}))) as url:
        body = {"lora_name": "plain", "lora_path": "drop:plain"}
        yield errors.AlreadyLoadedError, httpx.post(f"{url}/v1/load_lora_adapter", json=body)
        yield errors.NotFromSourceError, httpx.post(f"{url}/v1/unload_lora_adapter", json=body)


def stalled(url):
    """Send half of a body, and wait."""
    address = url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as client:
        head = f"POST {APPLY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nConnection: close\r\n\r\n"
        client.sendall(head.encode() + b'{"inputs"')
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    body = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert body["code"] == errors.StalledError.code
    return body["detail"]


@contextlib.contextmanager
def failing_fsync(number):
    def fail(_descriptor):
        raise OSError(number, os.strerror(number))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def raised(kind, function, *arguments):
    with pytest.raises(kind) as found:
        function(*arguments)
    return found.value.detail


def nowhere():
    """A store of objects behind a port without a listener."""
    return S3Store(
        "bucket",
        endpoint="http://127.0.0.1:9",
        access_key_id="key",
        secret_access_key="key",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )


def base_changed(folder):
    (folder / "b").mkdir(parents=True)
    path = folder / "b" / "model.safetensors"
    path.write_bytes(safetensors.encode({"q_proj.weight": np.ones((600, 1000), np.float32)}))
    made = BonsaiLoraSet.new(LoraConfig(rank=1), "b", "s").add_adapters({"q_proj": (1000, 600)})
    model = MergedModel(BaseFolder(folder).get("b"), [Ingredient(made, '"e"')])
    file = merged_files(model)[path.name]
    pieces = file.pieces(0, file.size_bytes)
    next(pieces)()
    os.utime(path, ns=(1, 1))
    return raised(errors.BaseChangedError, next(pieces))


def written(texts):
    """Return the texts as the file has them."""
    parts = [
        f"{kind.code} ({int(status_of(kind))})\n" + "".join(f"    {one}\n" for one in texts[kind])
        for kind in texts
    ]
    return "\n".join(parts)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return produce(tmp_path_factory.mktemp("errors"))


@pytest.mark.parametrize("kind", leaves(), ids=lambda kind: kind.code)
def test_a_text_says_what_is_wrong_then_what_to_do(texts, kind):
    assert texts[kind], "this error has no example"
    for text in texts[kind]:
        problem, _, remedy = text.partition("; ")
        assert problem, text
        assert remedy.partition(" ")[0] in VERBS, text
        assert not re.search(r"\b(we|our|us|you|your|please|sorry|oops)\b", text, re.IGNORECASE), (
            text
        )
        assert text == text.strip(), text
        assert not text.endswith("."), text


def test_no_text_in_the_code_ends_with_what_is_wrong():
    for path in (file for folder in FOLDERS for file in (PACKAGE / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and call.args and is_error(call.func):
                text = literal(call.args[0])
                is_complete = (
                    not text.strip() or "; " in text or any(one in text for one in OF_TRITON)
                )
                assert is_complete, f"{path}:{call.lineno}: {text}"


def is_error(function):
    name = getattr(function, "attr", getattr(function, "id", ""))
    kind = getattr(errors, name, None)
    # Reasons why a file in the store is unreadable go to the log, not to a client.
    return inspect.isclass(kind) and kind is not errors.MalformedSafetensorsError


def literal(node):
    """Return the constant parts of a string expression."""
    return "".join(
        one.value
        for one in ast.walk(node)
        if isinstance(one, ast.Constant) and isinstance(one.value, str)
    )


def test_the_written_texts_are_those_of_the_service(texts):
    assert written(texts) == GOLDEN.read_text(), f"run python {Path(__file__).name}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        GOLDEN.write_text(written(produce(Path(temporary))))
    sys.exit()

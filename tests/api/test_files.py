"""Files over HTTP: parts of ranges as RFC 9110 writes them, and tags that name one content each."""

import contextlib
import itertools
import os
import re
import shutil

import httpx
import numpy as np
import pytest
from conftest import TINY, assert_problem, serving, upload

from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings

MERGED = "/v1/bases/tiny-qwen3/merged"
FILES = {
    "configuration of a set": "/v1/sets/plain/adapter_config.json",
    "weights of a set": "/v1/sets/plain/adapter_model.safetensors",
    "merged weights": f"{MERGED}/plain/model-00002-of-00003.safetensors",
    "merged at a scale": f"{MERGED}/plain/model-00001-of-00003.safetensors?scale=0.5",
    "file of a base": f"{MERGED}/plain/config.json",
    "merged weights on the hub": "/tiny-qwen3/plain/resolve/main/model-00003-of-00003.safetensors",
    "weights on the hub": "/adapters/plain/resolve/main/adapter_model.safetensors",
}


def served(tmp_path, *bases):
    for base in bases:
        shutil.copytree(TINY / "base", tmp_path / "bases" / base)
    known = Settings(store=str(tmp_path / "store"), bases=str(tmp_path / "bases"))
    return create_app(known)


@pytest.fixture(scope="module")
def app_of_files(tmp_path_factory):
    return served(tmp_path_factory.mktemp("files"), "tiny-qwen3")


@pytest.fixture(scope="module")
def service(app_of_files):
    """A client of a service with the base `tiny-qwen3` and the set `plain`."""
    with serving(app_of_files) as url, httpx.Client(base_url=url, timeout=30) as client:
        upload(client, "plain", TINY / "plain")
        yield client


def parts_of(answer):
    """Media type, range and bytes of each part, read strictly (RFC 2046, section 5.1)."""
    media, _, boundary = answer.headers["content-type"].partition("; boundary=")
    assert media == "multipart/byteranges"
    assert re.fullmatch(r"[0-9A-Za-z'()+_,./:=?-]{1,70}", boundary)
    rest, found = answer.content.removeprefix(b"\r\n"), []
    while True:
        start = f"--{boundary}".encode()
        assert rest.startswith(start)
        rest = rest[len(start) :]
        if rest.startswith(b"--"):
            assert rest in (b"--", b"--\r\n")
            return found
        head, _, rest = rest.partition(b"\r\n\r\n")
        lines = [line.partition(b": ") for line in head.removeprefix(b"\r\n").split(b"\r\n")]
        fields = {name.lower().decode(): value.decode() for name, _, value in lines}
        assert fields.keys() == {"content-type", "content-range"}
        matched = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", fields["content-range"])
        first, last, size = map(int, matched.groups())
        length = last - first + 1
        assert rest[length : length + 2] == b"\r\n"
        found.append((fields["content-type"], first, rest[:length], size))
        rest = rest[length + 2 :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "asked",
    [
        [(0, 0), (1, 1)],
        [(0, 7), (100, 130), (40, 44)],
        [(5, 9), (0, 3), (200, 290)],
        [(0, 3), (-6, None)],
        [(10, 12), (-1, None), (0, 0)],
    ],
    ids=str,
)
def test_parts_of_several_ranges(service, name, asked):
    whole = service.get(FILES[name])
    size = len(whole.content)
    specs = [f"{first}" if last is None else f"{first}-{last}" for first, last in asked]
    answer = service.get(FILES[name], headers={"Range": "bytes=" + ", ".join(specs)})
    assert answer.status_code == 206
    assert "content-range" not in answer.headers  # RFC 9110, section 15.3.7.2
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["etag"] == whole.headers["etag"]
    found = parts_of(answer)
    expected = [
        (size + first, size) if last is None else (first, last + 1) for first, last in asked
    ]
    assert [(first, first + len(data)) for _, first, data, _ in found] == expected
    for media, first, data, length in found:
        assert media == whole.headers["content-type"]
        assert length == size
        assert data == whole.content[first : first + len(data)]


@pytest.mark.parametrize("name", FILES)
def test_one_range(service, name):
    whole = service.get(FILES[name])
    size = len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    for spec, start, stop in (
        ("0-0", 0, 1),
        ("3-9", 3, 10),
        (f"{size - 1}-", size - 1, size),
        (f"{size - 1}-{size + 9}", size - 1, size),
        ("-1", size - 1, size),
        (f"-{size + 9}", 0, size),
        (f"{size}-, 4-5", 4, 6),
    ):
        answer = service.get(FILES[name], headers={"Range": f"bytes={spec}"})
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
        assert answer.headers["content-length"] == str(stop - start)
        assert answer.headers["content-type"] == whole.headers["content-type"]
        assert answer.content == whole.content[start:stop]
    for spec in (f"{size}-", f"{size}-{size}", "-0"):
        answer = service.get(FILES[name], headers={"Range": f"bytes={spec}"})
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{size}"
        if not FILES[name].startswith(("/tiny", "/adapters")):
            assert_problem(answer, 416, "range_not_satisfiable")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("asked", [None, "bytes=0-3", "bytes=0-3,5-6", "bytes=999999999-"])
def test_head_is_the_whole_file_whatever_range_is_asked_for(service, name, asked):
    """Range is defined for GET alone (RFC 9110, section 14.2)."""
    whole = service.get(FILES[name])
    head = service.head(FILES[name], headers={} if asked is None else {"Range": asked})
    assert head.status_code == 200
    assert head.content == b""
    assert "content-range" not in head.headers
    for field in ("content-length", "content-type", "etag", "accept-ranges"):
        assert head.headers[field] == whole.headers[field]


@pytest.mark.parametrize("name", FILES)
def test_a_range_of_different_content_is_not_given(service, name):
    """If-Range compares strongly (RFC 9110, section 13.1.5)."""
    etag = service.head(FILES[name]).headers["etag"]
    others = {service.head(path).headers["etag"] for path in FILES.values()} - {etag}
    late = "Thu, 01 Jan 2099 00:00:00 GMT"
    for condition, status in [
        (etag, 206),
        (f"W/{etag}", 200),
        (etag[:-1], 200),
        ('"x"', 200),
        (late, 200),
        *((other, 200) for other in others),
    ]:
        answer = service.get(FILES[name], headers={"Range": "bytes=0-1", "If-Range": condition})
        assert answer.status_code == status, condition


def train_on(folder):
    """Make it another checkpoint of the same sizes and times, as reproducible builds do."""
    for path in folder.glob("*.safetensors"):
        status, content = path.stat(), bytearray(path.read_bytes())
        weights = np.frombuffer(content, np.uint8)[-(len(content) // 2) :]
        weights ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def tag(client, path):
    """The tag of a path: HEAD, GET and a range of it agree."""
    found = {
        client.head(path).headers["etag"],
        client.get(path).headers["etag"],
        client.get(path, headers={"Range": "bytes=0-0"}).headers["etag"],
    }
    assert len(found) == 1, found
    (etag,) = found
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', etag), "strong, and of letters that a tag may have"
    return etag


def test_a_tag_names_one_content(tmp_path):
    """Over files, sets, bases, scales, weights and versions: no tag stands for two contents."""
    app = served(tmp_path, "one", "two")
    train_on(tmp_path / "bases" / "two")
    with serving(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        for name in ("plain", "attention-only"):
            upload(client, name, TINY / name)
        upload(client, "twin", TINY / "plain")
        weights = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
        sets = ["plain", "attention-only", "twin"]
        queries = ["", "?scale=0.5", "?scale=-1", "?scale=0", "?set=attention-only"]
        queries += ["?set=attention-only&weight=0.5", "?scale=0.5&set=attention-only"]
        queries += ["?set=attention-only&set=twin&weight=0.5&weight=0.25"]
        queries += ["?set=attention-only&set=twin&weight=0.25&weight=0.5"]
        paths = [
            f"/v1/sets/{name}/{file}"
            for name in sets
            for file in ("adapter_config.json", "adapter_model.safetensors")
        ]
        paths += [
            f"/v1/bases/{base}/merged/{name}/{file}"
            for base, name, file in itertools.product(("one", "two"), sets, weights)
        ]
        paths += [f"/v1/bases/one/merged/plain/{weights[0]}{query}" for query in queries[1:]]
        paths += [f"/v1/bases/one/merged/plain/{file}" for file in ("config.json", weights[1])]
        tags = {path: tag(client, path) for path in dict.fromkeys(paths)}
        contents = {path: client.get(path).content for path in tags}
        for path, other in itertools.combinations(tags, 2):
            assert tags[path] != tags[other] or contents[path] == contents[other], (path, other)
        listed = client.get("/v1/bases/one/merged/plain").json()["files"]
        assert len({one["etag"] for one in listed}) == len(listed)
        for one in listed:
            assert tag(client, f"/v1/bases/one/merged/plain/{one['name']}") == one["etag"]
        # Another version has other tags, wherever the set is in it, and only there.
        client.delete("/v1/sets/plain/adapters/model.layers.0.self_attn.q_proj")
        for path, etag in tags.items():
            is_of_it = "/plain/" in path and not path.endswith("merged/plain/config.json")
            assert (tag(client, path) != etag) == is_of_it, path
        now = {path: tag(client, path) for path in tags}
        assert not set(now.values()) & {tags[path] for path in tags if now[path] != tags[path]}
    # A restart changes none.
    known = app.state.context.settings
    with serving(create_app(known)) as url, httpx.Client(base_url=url, timeout=30) as client:
        assert {path: tag(client, path) for path in now} == now


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_only_content_needs_a_place_in_the_long_lane(service, app_of_files, path):
    tag = service.head(path).headers["etag"]
    lane = app_of_files.state.context.long
    with contextlib.ExitStack() as stack:
        while lane.in_progress < lane._places:
            stack.enter_context(lane.admit())
        assert_problem(service.get(path), 503, "busy")
        assert_problem(service.get(path, headers={"Range": "bytes=0-3"}), 503, "busy")
        assert service.head(path).status_code == 200
        assert service.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert service.get(path).status_code == 200


@pytest.mark.parametrize("path", FILES.values(), ids=FILES)
def test_only_json_is_called_json(service, path):
    is_json = path.endswith(".json")
    answer = service.get(path)
    assert (answer.headers["content-type"] == "application/json") == is_json
    assert answer.content.startswith(b"{") == is_json

"""Requests of Git LFS, as huggingface_hub and git-lfs send them, for tests."""

import hashlib

from conftest import TINY
from test_hub_push import CONFIG, HEADER, MODEL, file_line

LFS_TYPE = "application/vnd.git-lfs+json"
CONTENT = (TINY / "plain" / MODEL).read_bytes()


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def ask(client, name, *contents, headers=None, **changes):
    """Ask where files can be uploaded."""
    objects = [{"oid": sha256_of(one), "size": len(one)} for one in contents or (CONTENT,)]
    body = {
        "operation": "upload",
        "transfers": ["basic", "multipart"],
        "objects": objects,
        "hash_algo": "sha256",
        **changes,
    }
    path = f"/adapters/{name}.git/info/lfs/objects/batch"
    known = {"Accept": LFS_TYPE, "Content-Type": LFS_TYPE, **(headers or {})}
    return client.post(path, json=body, headers=known)


def link_to(client, name, content=CONTENT):
    """Return the link that `content` can be uploaded to; None if it need not be."""
    answer = ask(client, name, content)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == LFS_TYPE
    [found] = answer.json()["objects"]
    assert (found["oid"], found["size"]) == (sha256_of(content), len(content))
    return found["actions"]["upload"]["href"] if "actions" in found else None


def pointer_line(weights=CONTENT, /, **changes):
    """Return the line of a commit for weights that were uploaded before."""
    value = {"path": MODEL, "algo": "sha256", "oid": sha256_of(weights), "size": len(weights)}
    return {"key": "lfsFile", "value": {**value, **changes}}


def pointing_lines(content=CONTENT, folder=TINY / "plain"):
    """Return a commit whose weights were uploaded before."""
    return [HEADER, file_line(CONFIG, (folder / CONFIG).read_bytes()), pointer_line(content)]


def assert_refused(response, status):
    """Check that the response is an error in the form of Git LFS; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == LFS_TYPE
    body = response.json()
    assert body.keys() == {"message", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"]
    shown = body["message"].encode("ascii", "replace").decode()
    assert shown in response.headers["x-error-message"]
    return body["message"]

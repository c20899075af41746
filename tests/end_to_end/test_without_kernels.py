"""Without machine code (switched off, forbidden, or not installed) the answers are the same."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import ml_dtypes
import numpy as np
import pytest
import reference
from targets import TARGETS

from bonsai_lora.formats import safetensors

ROOT = Path(__file__).parents[2]
HEADERS = {"Content-Type": "application/vnd.safetensors", "Accept": "application/vnd.safetensors"}

COMMAND = "import sys; from bonsai_lora.cli.main import main; sys.exit(main(sys.argv[1:]))"
PRCTL = (  # PR_SET_MDWE, of Linux 6.3
    "import ctypes, os\nif ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): os._exit(77)\n"
)
SECCOMP = """
import ctypes, os, platform, struct
mmap, mprotect = {"x86_64": (9, 10), "aarch64": (222, 226)}[platform.machine()]
LOAD, EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
FLAGS, PROTECTION, EXECUTE, ANONYMOUS = 16 + 8 * 3, 16 + 8 * 2, 4, 0x20
program = [
    (LOAD, 0, 0, 0),                # the number of the system call
    (EQUAL, 3, 0, mprotect),        # to its protection
    (EQUAL, 0, 4, mmap),            # else allowed
    (LOAD, 0, 0, FLAGS),
    (ANY_BIT, 0, 2, ANONYMOUS),     # of a file: allowed
    (LOAD, 0, 0, PROTECTION),
    (ANY_BIT, 1, 0, EXECUTE),       # refused
    (RETURN, 0, 0, 0x7FFF0000),
    (RETURN, 0, 0, 0x00050000 | 1), # EPERM
]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(code)))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, filter, 0, 0): os._exit(77)
"""


@contextlib.contextmanager
def serving(start: str, *flags: str):
    """Run the command after the code `start`; give a client, and what it said before it was ready."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            start + COMMAND,
            "serve",
            "--port",
            "0",
            "--store",
            "memory:",
            *flags,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    said, found = [], None
    for line in process.stderr:
        said.append(line)
        if found := re.search(r"serving on (http://[\d.:]+)", line):
            break
    drain = threading.Thread(target=process.stderr.read)
    drain.start()
    try:
        if found is None and process.wait(timeout=20) == 77:
            pytest.skip("this kernel has no such switch")
        assert found, "".join(said)
        with httpx.Client(base_url=found[1], timeout=30) as client:
            yield client, "".join(said)
    finally:
        process.terminate()
        process.wait(timeout=20)
        drain.join(timeout=20)
        process.stderr.close()


def answers_of(client: httpx.Client) -> dict[str, object]:
    """Return what a service answers to applies and merges of a set, in binary and JSON."""
    rng = np.random.default_rng(9)
    client.post("/v1/sets", json={"name": "s"}).raise_for_status()
    x, found = rng.standard_normal((9, 100)).astype(np.float32), {}
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        name = np.dtype(dtype).name
        path = f"/v1/sets/s/adapters/{name}"
        tensors = {
            "lora_A": rng.standard_normal((12, 100)).astype(dtype),
            "lora_B": rng.standard_normal((70, 12)).astype(dtype),
        }
        body = safetensors.encode(tensors)
        client.put(f"{path}?alpha=24", content=body, headers=HEADERS).raise_for_status()

        def post(action, tensors, path=path):
            answer = client.post(
                f"{path}/{action}", content=safetensors.encode(tensors), headers=HEADERS
            )
            answer.raise_for_status()
            return answer.content

        outputs = safetensors.decode(post("apply", {"inputs": x}))[0]["outputs"]
        alone = safetensors.decode(post("apply", {"inputs": x[3:4]}))[0]["outputs"]
        assert alone.tobytes() == outputs[3:4].tobytes()
        answer = client.post(f"{path}/apply", json={"inputs": x.tolist()})
        assert np.array(answer.json()["outputs"], np.float32).tobytes() == outputs.tobytes()
        exact = reference.apply(tensors["lora_A"], tensors["lora_B"], 2.0, x)
        assert reference.relative_error(outputs, exact) < 2e-6
        weights = rng.standard_normal((70, 100)).astype(dtype)
        found[name] = post("merge", {"weights": weights}), outputs
    return found


@pytest.fixture(scope="module")
def expected():
    """Return what a service with the kernels answers."""
    with serving("") as (client, said):
        assert "computing in NumPy" not in said or TARGETS == [None]
        return answers_of(client)


@pytest.mark.skipif(sys.platform != "linux", reason="the switches are Linux's")
@pytest.mark.parametrize(
    ("start", "flags", "reason"),
    [
        ("", ["--kernels", "off"], None),
        (PRCTL, [], "forbids memory to become executable"),
        (SECCOMP, [], "forbids memory to become executable"),
        ("import sys; sys.modules['llvmlite'] = None\n", [], "llvmlite is not installed"),
    ],
    ids=["off", "prctl", "seccomp", "no-llvmlite"],
)
def test_a_service_answers_the_same(expected, start, flags, reason):
    with serving(start, *flags) as (client, said):
        got = answers_of(client)
    assert said.count("computing in NumPy") == (reason is not None)
    assert reason is None or reason in said
    for name, (merged, outputs) in got.items():
        assert merged == expected[name][0]
        assert reference.relative_error(outputs, expected[name][1]) < 1e-6


@pytest.mark.skipif(TARGETS == [None], reason="they are not there")
def test_a_copy_without_the_kernels_passes(tmp_path):
    shutil.copytree(
        ROOT / "app", tmp_path / "app", ignore=shutil.ignore_patterns("kernels", "__pycache__")
    )
    done = subprocess.run(
        [
            *[sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"],
            *["core/test_products.py", "core/test_backend.py", "core/test_cast.py"],
            *["core/test_adapter.py", "wire", "api/test_apply.py"],
            *["api/test_merge.py", "api/test_merged.py"],
        ],
        cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "app")},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d{2,} passed", done.stdout)

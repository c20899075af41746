"""The TypeScript example, on the client that openapi-ts makes of openapi.json: checked, and run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from documents import find_node

ROOT = Path(__file__).parents[2]
PACKAGES = Path(os.environ.get("TYPESCRIPT_PACKAGES") or Path(sys.prefix) / "typescript")
NODE = find_node()

pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(NODE is None, reason="no Node.js 22.18 or newer"),
    pytest.mark.skipif(
        not (PACKAGES / "node_modules").is_dir(), reason="make test-page installs its packages"
    ),
]


def run(folder, *command, **variables):
    done = subprocess.run(
        [str(NODE), *command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_is_sound_and_runs(client, tmp_path):
    folder = tmp_path / "example"
    shutil.copytree(ROOT / "examples" / "typescript", folder)
    (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
    tool = "node_modules/@hey-api/openapi-ts/bin/run.js"
    run(folder, tool, OPENAPI=str(ROOT / "openapi" / "openapi.json"))
    run(folder, "node_modules/typescript/bin/tsc")
    arguments = [str(TINY / "plain"), "model.layers.0.self_attn.q_proj", str(client.base_url)]
    printed = run(folder, "--no-warnings", "main.ts", *arguments)
    length = int.from_bytes(
        client.get("/v1/sets/typescript/adapter_model.safetensors").content[:8], "little"
    )
    assert printed.splitlines() == [
        "uploaded version 1: 14 modules",
        "applied: (1, 128), JSON and binary agree",
        f"range: status 206, a header of {length} bytes",
    ]

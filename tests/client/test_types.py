"""What a type checker knows of the clients."""

import os
import subprocess
import sys
from pathlib import Path

APP = Path(__file__).parents[2] / "app"

SCRIPT = """
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora import AsyncClient, Client
from bonsai_lora.client.answers import Applied, SetInfo, SetSummary
from bonsai_lora.errors import BonsaiLoraError


def use(x: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    with Client("http://localhost:8000", token="t", timeout=5) as client:
        info: SetInfo = client.create_set("s", config={"rank": 8}, model="qwen3-8b")
        rank: int = info["modules"][0]["rank"]
        sets: Iterator[SetSummary] = client.list_sets(base_model_name="m")
        names: list[str] = [one["name"] for one in sets]
        applied: Applied = client.apply("s", "q_proj", x, sets={"t": 0.5}, dtype="BF16")
        client.apply_mixed("q_proj", ["s", None, {"s": 1.0}], x)
        client.delete_set("s", if_match=info["etag"])
        try:
            merged: npt.NDArray[Any] = client.merge("s", "q_proj", x)
        except BonsaiLoraError as error:
            print(error.code, names, rank)
            raise
        total: npt.NDArray[Any] = applied.outputs + merged
        return total


async def use_async(x: npt.NDArray[np.float32]) -> AsyncIterator[bytes]:
    async with AsyncClient(uds="/run/s.sock") as client:
        applied: Applied = await client.apply("s", "q_proj", x)
        print(applied.versions["s"], [one["name"] async for one in client.list_sets()])
        async for block in client.merge_stream("s", "q_proj", [b""], dtype="F32"):
            yield block


def misuse(client: Client, aclient: AsyncClient) -> None:
    client.get_set()  # type: ignore[call-arg]
    client.get_set("s")["nothing"]  # type: ignore[misc]
    client.apply("s", "q_proj", [1.0], dtype="F64")  # type: ignore[arg-type]
    client.create_set("s", config={"r": 8})  # type: ignore[arg-type]
    client.upload_set("s", "folder", if_macth="x")  # type: ignore[call-arg]
    client.no_such_call()  # type: ignore[attr-defined]
    wrong: Applied = aclient.apply("s", "q_proj", [1.0])  # type: ignore[assignment]
"""


def test_a_users_script_passes_mypy_strict(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = True\n[mypy-llvmlite.*]\nignore_missing_imports = True\n"
    )
    command = [sys.executable, "-m", "mypy", "--no-incremental", "script.py"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        cwd=tmp_path,
        env={**os.environ, "MYPYPATH": str(APP)},
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""transformers, peft and huggingface_hub load from the service by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import TINY, serving, upload
from test_peft_options import OPTIONS, make_adapter

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]


def single_float32(folder):
    """Write the tiny base as one float32 file."""
    folder.mkdir(parents=True)
    tensors = {}
    for path in sorted((TINY / "base").glob("*.safetensors")):
        for name, value in safetensors.decode(path.read_bytes())[0].items():
            tensors[name] = value.astype(np.float32)
    (folder / "model.safetensors").write_bytes(safetensors.encode(tensors, {"format": "pt"}))
    for name in ("config.json", "generation_config.json"):
        shutil.copy(TINY / "base" / name, folder)


@pytest.mark.parametrize("adapter", ["plain", "rslora-patterns", "dora", "head-saved"])
@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_by_name(settings, tmp_path, base, adapter):
    single_float32(tmp_path / "bases" / "float32")
    shutil.copytree(TINY / "base", tmp_path / "bases" / "bfloat16")
    (tmp_path / "bases" / base / "templates").mkdir()
    (tmp_path / "bases" / base / "templates" / "a.jinja").write_text("{{ tools }}")
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url:
        with httpx.Client(base_url=url) as client:
            folder = TINY / adapter
            if adapter == "head-saved":
                import torch

                folder = tmp_path / "adapter"
                make_adapter(folder, torch.float32, OPTIONS[adapter])
            assert upload(client, adapter, folder).status_code == 201
            client.post("/v1/sets", json={"name": "zero", "config": {"rank": 1}})
            client.put("/v1/sets/zero/adapters/lm_head", json={"d_in": 64, "d_out": 128})
            client.post("/v1/sets", json={"name": "wide", "config": {"rank": 1}})
            client.put("/v1/sets/wide/adapters/lm_head", json={"d_in": 5, "d_out": 7})
            reason = client.get(f"/v1/bases/{base}/merged/wide").json()["detail"]
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
        }
        script = Path(__file__).parent / "hub_client.py"
        done = subprocess.run(
            [
                sys.executable,
                str(script),
                base,
                adapter,
                str(TINY / "tokens.npy"),
                str(tmp_path / "c"),
            ],
            capture_output=True,
            text=True,
            timeout=110,
            env=environment,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["sha"]) == 40
    assert found["files"] == found["folder"]
    assert found["config"]
    assert found["resumed"]
    assert found["parameters"] == 127_424
    assert f"{base}/{adapter}" in found["listed"]
    assert all(found["described"].values()), found["described"]
    assert found["errors"] == {
        "entry": "RemoteEntryNotFoundError",
        "repo": "RepositoryNotFoundError",
        "revision": "RevisionNotFoundError",
    }
    first_lines = {name: text.splitlines()[0] for name, text in found["refusals"].items()}
    introduced = first_lines.pop("transformers")
    assert introduced.endswith(f"when trying to load {base}/wide:"), introduced
    first_lines["transformers"] = found["refusals"]["transformers"].splitlines()[1]
    assert first_lines.keys() == {"file", "weights", "snapshot", "transformers"}
    for name, line in first_lines.items():
        assert line.startswith(f"403 Forbidden: {reason} (request "), (name, line)
    # Merged float32 files differ from peft's by float32 sums, merged bfloat16 files by their dtype.
    assert found["merged_against_peft"] < (2e-5 if base == "float32" else 2e-2)
    assert found["beside_against_peft"] < 2e-5

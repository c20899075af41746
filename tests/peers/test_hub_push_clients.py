"""huggingface_hub and peft push to the service, and engines load from it, by their own calls."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from conftest import TINY, serving, upload
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

HERE = Path(__file__).parent


def run(url, folder, command, **variables):
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        **variables,
    }
    return subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)


@pytest.mark.parametrize(
    ("no_xet", "origin"), [("0", ""), ("1", ""), ("1", "lfs")], ids=["xet", "regular", "lfs"]
)
def test_the_clients_of_the_hub_push(settings, tmp_path, no_xet, origin):
    shutil.copytree(TINY / "base", tmp_path / "bases" / "tiny-qwen3")
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    (tmp_path / "scratch").mkdir()
    script = [sys.executable, str(HERE / "hub_push_client.py")]
    app = create_app(known)
    with serving(app) as url:
        done = run(
            url,
            tmp_path,
            [*script, str(TINY / "base"), str(TINY / "plain"), str(tmp_path / "scratch")],
            HF_HUB_DISABLE_XET=no_xet,
            HF_HUB_USER_AGENT_ORIGIN=origin,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        with httpx.Client(base_url=url) as client:
            names = [one["name"] for one in client.get("/v1/sets").json()["sets"]]
            assert client.get("/v1/sets/pushed").json()["version"] == 3
    assert names == ["folder", "pushed"]
    # The secret is made when LFS first asks for a link.
    assert (app.state.store.root / "staged" / "secret").exists() is (origin == "lfs")
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("xet") is (no_xet == "0")
    refusals = found.pop("refusals")
    assert found.pop("kept_name") == "adapters/folder"
    assert found.pop("config") == json.loads((TINY / "plain/adapter_config.json").read_text())["r"]
    assert all(found.values()), found
    assert "training_args.bin" in done.stderr
    assert refusals["race"].startswith("412")
    assert "the parent commit is" in refusals["race"]
    assert refusals["nan"].startswith("422")
    assert "NaN" in refusals["nan"]
    assert refusals["merged"].startswith("422")
    assert "push to adapters/folder" in refusals["merged"]
    assert refusals["exists"].startswith("409")
    assert refusals["alone"].startswith("422")
    assert "adapter_model" in refusals["alone"]
    # With Xet, the client asks for a pull request by a route of its own.
    assert refusals["request"].startswith("404" if no_xet == "0" else "422")


def test_the_command_pushes_with_a_key(settings, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add(scopes=["read", "write"])
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    hf = str(Path(sys.executable).with_name("hf"))
    with serving(app) as url:
        command = [hf, "upload", "adapters/acme.one", str(TINY / "plain")]
        done = run(url, tmp_path, command, HF_TOKEN=token)
        assert done.returncode == 0, done.stderr
        assert "adapters/acme.one" in done.stdout
        with caller(url, token) as client:
            assert client.get("/v1/sets/acme.one").json()["version"] == 1
        command[2] = "adapters/umbra.one"
        refused = run(url, tmp_path, command, HF_TOKEN=token)
        assert refused.returncode != 0
        assert "may not write to 'umbra.one'" in refused.stderr, refused.stderr


def test_its_functions_for_lfs_send_weights(settings, tmp_path):
    """As uploaders call them that choose LFS themselves."""
    made = KeysFileMaker(tmp_path / "keys.json")
    token = made.add(scopes=["read", "write"])
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    script = [sys.executable, str(HERE / "hub_lfs_client.py"), str(TINY / "plain")]
    with serving(app) as url:
        done = run(url, tmp_path, script, HF_TOKEN=token)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        with caller(url, token) as client:
            assert client.get("/v1/sets/acme.one").json()["version"] == 1
    assert found["transfer"] == "basic"
    assert found["actions"] == [["upload"], None]
    assert [code for code, _ in found["errors"]] == [413]
    assert "the limit is" in found["errors"][0][1]
    assert "may not write to 'umbra.one'" in found["foreign"]
    assert "was not uploaded" in found["missing"]
    assert "not one that this service signed" in found["forged"]
    assert found["weights"] is True


def test_engines_load_by_their_own_calls(service, tmp_path):
    with httpx.Client(base_url=service) as client:
        assert upload(client, "mine", TINY / "plain").status_code == 201
        size = len(client.get("/v1/sets/mine/adapter_model.safetensors").content)
    script = [sys.executable, str(HERE / "hub_engines.py"), "adapters/mine"]
    done = run(service, tmp_path, script)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"vllm_path", "vllm_resolver", "sglang", "lorax"}
    config = json.loads((TINY / "plain" / "adapter_config.json").read_text())
    expected = {"type": "LORA", "base": config["base_model_name_or_path"], "bytes": size}
    assert all(one == expected for one in found.values()), found

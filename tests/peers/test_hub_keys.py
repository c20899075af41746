"""huggingface_hub with a key in HF_TOKEN."""

import os
import subprocess
import sys

import pytest
from conftest import TINY, serving, upload
from keyring import KeysFileMaker, caller

from bonsai_lora.api.app import create_app

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

SCRIPT = """
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError

api = HfApi()
print(*sorted(one.id for one in api.list_models(author="adapters")))
print(open(hf_hub_download("adapters/acme.one", "adapter_config.json")).read(1))
for name in ("umbra.one", "umbra.two"):
    try:
        hf_hub_download(f"adapters/{name}", "adapter_config.json")
    except RepositoryNotFoundError:
        print("absent")
"""


def run(url, folder, token):
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": token,
    }
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, env=environment
    )


def test_a_token_is_a_key(settings, tmp_path):
    made = KeysFileMaker(tmp_path / "keys.json")
    root, token = made.add(prefixes=[""]), made.add()
    app = create_app(settings.model_copy(update={"keys_file": made.path}))
    with serving(app) as url:
        with caller(url, root) as client:
            for name in ("acme.one", "umbra.one"):
                assert upload(client, name, TINY / "plain").status_code == 201
        done = run(url, tmp_path / "hf", token)
        assert done.stdout.split() == ["adapters/acme.one", "{", "absent", "absent"], done.stderr
        refused = run(url, tmp_path / "hf", "bl_unknown")
        assert "HfHubHTTPError" in refused.stderr or "RepositoryNotFoundError" in refused.stderr

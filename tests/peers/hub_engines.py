"""Run by test_hub_push_clients with HF_ENDPOINT set: what engines do with huggingface_hub to load adapters.

Each function makes the calls of the file that it names, in the same order.
"""

import json
import os
import sys
from pathlib import Path

from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

repo = sys.argv[1]


def vllm_path():
    """vllm/lora/utils.py, get_adapter_absolute_path: `--lora-modules name=adapters/my-set`."""
    return snapshot_download(repo_id=repo)


def vllm_resolver():
    """vllm/plugins/lora_resolvers/hf_hub_resolver.py, HfHubResolver.resolve_lora."""
    files = HfApi().list_repo_files(repo_id=repo)
    assert "adapter_config.json" in files
    return os.path.join(snapshot_download(repo_id=repo, allow_patterns="*"), ".")


def sglang():
    """sglang/srt/lora/lora_config.py, and the weights of model_loader/weight_utils.py."""
    folder = snapshot_download(repo, allow_patterns=["*.json"])
    assert not (Path(folder) / "added_tokens.json").exists()
    names = HfFileSystem().ls(repo, detail=False, revision=None)
    assert any(name.endswith(".safetensors") for name in names)
    return snapshot_download(repo, allow_patterns=["*.safetensors"])


def lorax():
    """server/lorax_server/utils/sources/hub.py, HubModelSource."""
    hf_hub_download(repo, filename="adapter_config.json")
    info = HfApi().model_info(repo, revision=None)
    names = [one.rfilename for one in info.siblings if one.rfilename.endswith(".safetensors")]
    assert len(names) == 1
    path = hf_hub_download(filename=names[0], repo_id=repo, revision=None, local_files_only=False)
    return str(Path(path).parent)


found = {}
for load in (vllm_path, vllm_resolver, sglang, lorax):
    folder = Path(load())
    config = json.loads((folder / "adapter_config.json").read_text())
    found[load.__name__] = {
        "type": config["peft_type"],
        "base": config["base_model_name_or_path"],
        "bytes": (folder / "adapter_model.safetensors").stat().st_size,
    }
print(json.dumps(found))

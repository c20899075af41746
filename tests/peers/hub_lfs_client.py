"""Run by test_hub_push_clients with HF_ENDPOINT set: huggingface_hub's functions for LFS, unchanged."""

import json
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.lfs import UploadInfo, lfs_upload, post_lfs_batch_info
from safetensors.numpy import load_file

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
folder = Path(sys.argv[1])
api, found = HfApi(), {}


def addition(name, mode):
    made = CommitOperationAdd(name, str(folder / name))
    made._upload_mode, made._should_ignore, made._is_uploaded = mode, False, True
    return made


def ask(name, *infos):
    return post_lfs_batch_info(infos, None, "model", f"adapters/{name}", "main")


def refusal(call):
    try:
        call()
    except HfHubHTTPError as error:
        return str(error)
    return "none"


weights, config = addition(MODEL, "lfs"), addition(CONFIG, "regular")
commit = [weights, config]
found["missing"] = refusal(
    lambda: api.create_commit("adapters/acme.one", commit, commit_message="x")
)
[action], errors, found["transfer"] = ask("acme.one", weights.upload_info)
link = action["actions"]["upload"]["href"]
forged = {
    **action,
    "actions": {"upload": {"href": f"{link[:-1]}{'1' if link[-1] == '0' else '0'}"}},
}
found["forged"] = refusal(lambda: lfs_upload(weights, forged))
lfs_upload(weights, action)
[again], _, _ = ask("acme.one", weights.upload_info)
lfs_upload(weights, again)
found["actions"] = [list(one["actions"]) if "actions" in one else None for one in (action, again)]
large = UploadInfo(size=1 << 50, sample=b"", sha256=bytes(32))
_, errors, _ = ask("acme.one", large)
found["errors"] = [[one["error"]["code"], one["error"]["message"]] for one in errors]
found["foreign"] = refusal(lambda: ask("umbra.one", weights.upload_info))
api.create_commit("adapters/acme.one", commit, commit_message="x")
pulled = load_file(hf_hub_download("adapters/acme.one", MODEL))
expected = load_file(folder / MODEL)
found["weights"] = pulled.keys() == expected.keys() and all(
    (pulled[name] == expected[name]).all() for name in expected
)
print(json.dumps(found))

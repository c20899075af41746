"""Run by test_hub with HF_ENDPOINT set: the hub's own clients, unchanged, against the service."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    get_safetensors_metadata,
    hf_hub_download,
    hf_hub_url,
    list_repo_files,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, tokens_path, cache = sys.argv[1:]
tokens = torch.from_numpy(np.load(tokens_path))


def logits(model):
    with torch.no_grad():
        return model.eval()(tokens).logits.float()


merged = AutoModelForCausalLM.from_pretrained(f"{base}/{adapter}", dtype=torch.float32)
api = HfApi()
info = api.model_info(f"{base}/{adapter}")
files = list_repo_files(f"{base}/{adapter}")
folder = snapshot_download(f"{base}/{adapter}", revision=info.sha, cache_dir=cache)

# An aborted download: the Hub's cache has a part of the file, under the file's tag.
weights = next(name for name in files if name.endswith(".safetensors"))
about = get_hf_file_metadata(hf_hub_url(f"{base}/{adapter}", weights))
whole = (Path(folder) / weights).read_bytes()
blobs = Path(cache) / "resumed" / f"models--{base}--{adapter}" / "blobs"
blobs.mkdir(parents=True)
(blobs / f"{about.etag}.incomplete").write_bytes(whole[:3000])
again = hf_hub_download(f"{base}/{adapter}", weights, cache_dir=Path(cache) / "resumed")
resumed = Path(again).read_bytes() == whole and about.size == len(whole)
metadata = get_safetensors_metadata(f"{base}/{adapter}")
one = Path(hf_hub_download(f"{base}/{adapter}", "config.json", cache_dir=cache))
repo = f"{base}/{adapter}"
sized = {file.rfilename: file.size for file in api.model_info(repo, files_metadata=True).siblings}
api.auth_check(repo)
described = {
    "branch": api.list_repo_refs(repo).branches[0].target_commit == info.sha,
    "commit": [commit.commit_id for commit in api.list_repo_commits(repo)] == [info.sha],
    "path": [(file.path, file.size) for file in api.get_paths_info(repo, [weights, "no.txt"])]
    == [(weights, len(whole))],
    "size": sized[weights] == len(whole),
    "folder": [one.path for one in api.list_repo_tree(repo, "templates")] == ["templates/a.jinja"],
    "folders": "templates" in [one.path for one in api.list_repo_tree(repo)],
    "found": f"{repo}/templates/a.jinja" in HfFileSystem().find(repo),
    "user": api.whoami(token="hf_any")["name"] == "anonymous",
}
errors = {}
for name, call in {
    "entry": lambda: hf_hub_download(f"{base}/{adapter}", "nothing.json", cache_dir=cache),
    "repo": lambda: hf_hub_download(f"{base}/nothing", "config.json", cache_dir=cache),
    "revision": lambda: api.model_info(f"{base}/{adapter}", revision="99"),
}.items():
    try:
        call()
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        errors[name] = type(error).__name__
refusals = {}
for name, call in {
    "file": lambda: hf_hub_download(f"{base}/wide", "config.json", cache_dir=cache),
    "weights": lambda: hf_hub_download(f"{base}/wide", weights, cache_dir=cache),
    "snapshot": lambda: snapshot_download(f"{base}/wide", cache_dir=cache),
    "transformers": lambda: AutoModelForCausalLM.from_pretrained(f"{base}/wide"),
}.items():
    try:
        call()
    except OSError as error:
        refusals[name] = str(error)
plain = AutoModelForCausalLM.from_pretrained(f"{base}/zero", dtype=torch.float32)
wrapped = PeftModel.from_pretrained(plain, f"adapters/{adapter}")
beside = logits(wrapped)
once = logits(wrapped.merge_and_unload())
print(
    json.dumps(
        {
            "sha": info.sha,
            "files": sorted(files),
            "folder": sorted(
                str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()
            ),
            "config": one.exists(),
            "resumed": resumed,
            "parameters": sum(metadata.parameter_count.values()),
            "listed": [model.id for model in api.list_models(author=base)],
            "described": described,
            "errors": errors,
            "refusals": refusals,
            "merged_against_peft": float((logits(merged) - once).norm() / once.norm()),
            "beside_against_peft": float((beside - once).norm() / once.norm()),
        }
    )
)

"""Run by test_hub_push_clients with HF_ENDPOINT set: the hub's own clients push adapters, unchanged."""

import json
import sys
from pathlib import Path

import torch
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._runtime import is_xet_available
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

base, folder, scratch = map(Path, sys.argv[1:])
api = HfApi()
found = {"xet": is_xet_available()}


def weights_of(path):
    return load_file(Path(path) / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# upload_folder: a checkpoint folder of a training run, with files that a set does not have.
(scratch / "run").mkdir()
for name in ("adapter_config.json", "adapter_model.safetensors"):
    (scratch / "run" / name).write_bytes((folder / name).read_bytes())
(scratch / "run" / "README.md").write_text("---\nlibrary_name: peft\n---\n# mine\n")
(scratch / "run" / "training_args.bin").write_bytes(bytes(100))
done = api.upload_folder(repo_id="adapters/folder", folder_path=scratch / "run")
info = api.model_info("adapters/folder")
pulled = snapshot_download("adapters/folder", cache_dir=scratch / "cache")
found["folder"] = info.sha == done.oid and done.repo_url.repo_id == "adapters/folder"
found["folder_weights"] = same(weights_of(folder), weights_of(pulled))

# push_to_hub of a model, twice: the set is created, then replaced.
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
for version in (1, 2):
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape) * version)
    adapted.push_to_hub("adapters/pushed")
    adapted.save_pretrained(scratch / "saved")
    back = snapshot_download("adapters/pushed", cache_dir=scratch / "cache")
    found[f"pushed_{version}"] = same(weights_of(scratch / "saved"), weights_of(back))
again = PeftModel.from_pretrained(
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), "adapters/pushed"
)
tokens = torch.arange(12).reshape(1, 12)
with torch.no_grad():
    expected, got = adapted.eval()(tokens).logits, again.eval()(tokens).logits
found["loaded_again"] = bool(torch.equal(expected, got))

# A race is refused, and a bad adapter with its reason.
old = api.model_info("adapters/pushed").sha
api.upload_folder(repo_id="adapters/pushed", folder_path=folder)
broken = load_file(folder / "adapter_model.safetensors")
name, value = next((name, value) for name, value in broken.items() if "lora_B" in name)
broken[name] = torch.full_like(value, float("nan"))
(scratch / "bad").mkdir()
save_file(broken, scratch / "bad" / "adapter_model.safetensors")
(scratch / "bad" / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
refusals = {}
for name, call in {
    "race": lambda: api.upload_folder(
        repo_id="adapters/pushed", folder_path=folder, parent_commit=old
    ),
    "nan": lambda: api.upload_folder(repo_id="adapters/bad", folder_path=scratch / "bad"),
    "merged": lambda: api.create_repo("tiny-qwen3/folder"),
    "exists": lambda: api.create_repo("adapters/folder"),
    "alone": lambda: api.create_commit(
        "adapters/alone",
        [CommitOperationAdd("adapter_config.json", str(folder / "adapter_config.json"))],
        commit_message="half",
    ),
    "request": lambda: api.upload_folder(repo_id="adapters/pr", folder_path=folder, create_pr=True),
}.items():
    try:
        call()
    except HfHubHTTPError as error:
        refusals[name] = f"{error.response.status_code} {error}"
found["refusals"] = refusals
found["kept_name"] = api.create_repo("adapters/folder", exist_ok=True).repo_id
one = hf_hub_download("adapters/pushed", "adapter_config.json", cache_dir=scratch / "cache")
found["config"] = json.loads(Path(one).read_text())["r"]
print(json.dumps(found))

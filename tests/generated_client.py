"""Run by test_documents: use the generated client in argv[1] against the service at argv[2]."""

import importlib
import io
import pkgutil
import sys

import numpy as np

sys.path.insert(0, sys.argv[1])

from bonsai_lora_client import Client
from bonsai_lora_client.api.adapters import put_adapter
from bonsai_lora_client.api.apply import apply_adapter
from bonsai_lora_client.api.sets import create_set, delete_set, get_set, list_sets
from bonsai_lora_client.models import ApplyRequest, CreateSet, NewAdapter, Problem
from bonsai_lora_client.types import File

from bonsai_lora.formats import safetensors

# Generated code parses every response as JSON, so it accepts JSON only.
client = Client(base_url=sys.argv[2], headers={"Accept": "application/json"})
made = create_set.sync(client=client, body=CreateSet(name="generated"))
assert made.version == 1, made
added = put_adapter.sync("generated", "q_proj", client=client, body=NewAdapter(d_in=4, d_out=2))
assert added.rank == 8, added
applied = apply_adapter.sync(
    "generated", "q_proj", client=client, body=ApplyRequest(inputs=[[1.0, 2.0, 3.0, 4.0]])
)
assert applied.outputs == [[0.0, 0.0]], applied
body = File(payload=io.BytesIO(safetensors.encode({"inputs": np.ones((3, 4), np.float32)})))
binary = apply_adapter.sync_detailed("generated", "q_proj", client=client, body=body)
assert binary.status_code == 200, binary
assert binary.parsed.outputs == [[0.0, 0.0]] * 3
assert [one.name for one in list_sets.sync(client=client).sets] == ["generated"]
missing = get_set.sync("nothing", client=client)
assert isinstance(missing, Problem), missing
assert missing.code == "set_not_found", missing
assert delete_set.sync_detailed("generated", client=client).status_code == 204

package = importlib.import_module("bonsai_lora_client")
found = [one.name for one in pkgutil.walk_packages(package.__path__, "bonsai_lora_client.")]
assert len(found) > 100, found
for name in found:
    importlib.import_module(name)

"""Run a model of transformers with a set that the service applies.

    pip install torch transformers
    python examples/qwen3_layers.py MODEL_FOLDER SET [URL]

The model keeps its weights: each module of the set adds what the service computes, so changing the
set changes the model's next answer, and a hundred models can share one set.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bonsai_lora import Client, Layer


def add_set(model: torch.nn.Module, client: Client, set_name: str) -> list:
    """Add the adapters of a set to the modules of `model` that they name; return the hooks.

    Calling `remove()` on each hook leaves the model as it was.
    """
    return [
        model.get_submodule(one["name"]).register_forward_hook(
            Layer(client, set_name, one["name"]).hook
        )
        for one in client.list_adapters(set_name)
    ]


def main(folder: str, set_name: str, url: str = "http://localhost:8000") -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("A bonsai is", return_tensors="pt")
    with Client(url) as client, torch.no_grad():
        for text in ("without the set", f"with {set_name}"):
            tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False)
            print(f"{text}: {tokenizer.decode(tokens[0])}")
            add_set(model, client, set_name)


if __name__ == "__main__":
    main(*sys.argv[1:])

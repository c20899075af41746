"""Kinds of adapters that peft on torch saves, uploaded and merged, against peft's own numbers."""

import httpx
import numpy as np
import pytest
import reference
from conftest import serving, upload

from bonsai_lora.api.app import create_app
from bonsai_lora.formats import safetensors

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

TOLERANCE = 2e-6
TOKENS = [[1, 5, 17, 39, 3]]


@pytest.fixture
def service(settings, tmp_path):
    (tmp_path / "bases").mkdir()
    known = settings.model_copy(update={"bases": str(tmp_path / "bases")})
    with serving(create_app(known)) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def qwen3(**changes):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**{**sizes, **heads, **changes}))


def train(model, **options):
    """Wrap a model by peft and move every trained parameter."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    wrapped = get_peft_model(model, LoraConfig(**{**config, **options}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return wrapped.eval()


def numbers(model):
    """The parameters of a torch model as float32 arrays."""
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def merged_files(service, base, name, **query):
    path = f"/v1/bases/{base}/merged/{name}"
    listed = service.get(path, params=query)
    assert listed.status_code == 200, listed.text
    found = {}
    for file in listed.json()["files"]:
        if file["name"].endswith(".safetensors"):
            content = service.get(f"{path}/{file['name']}", params=query).content
            found |= safetensors.decode(content)[0]
    return found


def check_merged(found, expected, names=None):
    for name in names or found:
        wanted = expected[name].astype(np.float64)
        assert reference.relative_error(found[name], wanted) < TOLERANCE, name


def check_reloaded(service, base, expected, folder):
    """peft loads the export into `base` and computes the same logits."""
    import torch
    from peft import PeftModel

    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(service.get(f"/v1/sets/s/{name}").content)
    again = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        got = again(torch.tensor(TOKENS)).logits.numpy()
        wanted = expected(torch.tensor(TOKENS)).logits.double().numpy()
    assert reference.relative_error(got, wanted) < TOLERANCE


RESIZED = {
    "copies": {},
    "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "head-saved": {"modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("case", RESIZED)
def test_resized_vocabularies(service, tmp_path, case, is_tied):
    from transformers import Qwen3ForCausalLM

    old, grown = tmp_path / "bases" / "old", tmp_path / "bases" / "grown"
    qwen3(tie_word_embeddings=is_tied).save_pretrained(old)
    start = Qwen3ForCausalLM.from_pretrained(old)
    start.resize_token_embeddings(44)
    start.save_pretrained(grown)
    model = train(start, **RESIZED[case])
    model.save_pretrained(tmp_path / "adapter")
    assert upload(service, "s", tmp_path / "adapter").status_code == 201

    # Where the embedding is adapted peft saves no copy of the head, so that has to be the same.
    fresh = Qwen3ForCausalLM.from_pretrained(grown if case == "adapted" else old)
    fresh.resize_token_embeddings(44)
    check_reloaded(service, fresh, model, tmp_path / "exported")
    refused = service.get("/v1/bases/old/merged/s")
    assert refused.status_code == 422
    if is_tied and case in ("saved", "head-saved", "adapted"):
        assert "ties its head" in refused.json()["detail"]
        return
    assert "resize_token_embeddings(44)" in refused.json()["detail"]
    check_merged(merged_files(service, "grown", "s"), numbers(model.merge_and_unload()))


def test_an_adapter_that_ties_head_and_embedding(service, tmp_path):
    """peft adds the delta twice when it merges; the model of its forward pass is meant."""
    import torch
    from transformers import Qwen3ForCausalLM

    start = qwen3(tie_word_embeddings=True)
    start.save_pretrained(tmp_path / "bases" / "b")
    targets = ["q_proj", "embed_tokens"]
    model = train(start, target_modules=targets, ensure_weight_tying=True)
    model.save_pretrained(tmp_path / "adapter")
    report = upload(service, "s", tmp_path / "adapter")
    assert report.status_code == 201, report.text
    check_reloaded(service, qwen3(tie_word_embeddings=True), model, tmp_path / "exported")
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes(service.get(f"/v1/bases/b/merged/s/{name}").content)
    with torch.no_grad():
        got = Qwen3ForCausalLM.from_pretrained(folder)(torch.tensor(TOKENS)).logits.numpy()
        wanted = model(torch.tensor(TOKENS)).logits.double().numpy()
    assert reference.relative_error(got, wanted) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [{"target_modules": ["query", "word_embeddings"]}, {"modules_to_save": ["word_embeddings"]}],
)
def test_embeddings_of_a_classifier(service, tmp_path, options):
    """BERT's configuration ties its embedding, but not to the head of a classifier."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    def bert():
        torch.manual_seed(0)
        sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
        return BertForSequenceClassification(BertConfig(**sizes, **heads))

    bert().save_pretrained(tmp_path / "bases" / "b")
    model = train(bert(), **{"target_modules": ["query"], "task_type": "SEQ_CLS", **options})
    model.save_pretrained(tmp_path / "adapter")
    assert upload(service, "s", tmp_path / "adapter").status_code == 201
    check_reloaded(service, bert(), model, tmp_path / "exported")
    check_merged(merged_files(service, "b", "s"), numbers(model.merge_and_unload()))


def gpt2():
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=40, n_positions=16)
    )


def test_a_resized_vocabulary_of_a_different_architecture(service, tmp_path):
    """GPT-2 calls its embedding wte, and ties its head to it."""
    from transformers import GPT2LMHeadModel

    old, grown = tmp_path / "bases" / "old", tmp_path / "bases" / "grown"
    gpt2().save_pretrained(old)
    start = GPT2LMHeadModel.from_pretrained(old)
    start.resize_token_embeddings(44)
    start.save_pretrained(grown)
    model = train(start, target_modules=["c_attn"])
    model.save_pretrained(tmp_path / "adapter")
    report = upload(service, "s", tmp_path / "adapter").json()
    assert "transformer.wte.weight" in report["warnings"][0]
    fresh = GPT2LMHeadModel.from_pretrained(old)
    fresh.resize_token_embeddings(44)
    check_reloaded(service, fresh, model, tmp_path / "exported")
    assert "resize_token_embeddings(44)" in service.get("/v1/bases/old/merged/s").json()["detail"]
    check_merged(merged_files(service, "grown", "s"), numbers(model.merge_and_unload()))


@pytest.mark.parametrize("use_dora", [False, True])
def test_conv1d(service, tmp_path, use_dora):
    """Square and oblong layers of GPT-2, whose weights are stored (in, out)."""
    start = gpt2()
    start.save_pretrained(tmp_path / "bases" / "gpt2")
    targets = ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    model = train(start, target_modules=targets, use_dora=use_dora)
    model.save_pretrained(tmp_path / "adapter")
    assert upload(service, "s", tmp_path / "adapter").status_code == 201
    check_reloaded(service, gpt2(), model, tmp_path / "exported")
    check_merged(merged_files(service, "gpt2", "s"), numbers(model.merge_and_unload()))


@pytest.mark.parametrize("trained", ["bare", "causal"])
def test_bare_and_causal_classes(service, tmp_path, trained):
    """An adapter of one class fits the checkpoint of the other."""
    whole = qwen3()
    bare = qwen3().model
    (whole if trained == "bare" else bare).save_pretrained(tmp_path / "bases" / "b")
    model = train(bare if trained == "bare" else whole, target_modules=["q_proj", "down_proj"])
    model.save_pretrained(tmp_path / "adapter")
    assert upload(service, "s", tmp_path / "adapter").status_code == 201
    expected = numbers(model.merge_and_unload())
    expected |= {name.removeprefix("model."): value for name, value in expected.items()}
    expected |= {f"model.{name}": value for name, value in expected.items()}
    found = merged_files(service, "b", "s")
    check_merged(found, expected, [name for name in found if name != "lm_head.weight"])


def test_an_adapter_of_a_compiled_model(service, tmp_path):
    """torch.compile and DDP leave their names in keys of a state dict that is saved by hand."""
    from safetensors.torch import load_file, save_file

    start = qwen3()
    start.save_pretrained(tmp_path / "bases" / "b")
    model = train(start)
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({f"module._orig_mod.{key}": one for key, one in load_file(path).items()}, path)
    report = upload(service, "s", tmp_path / "adapter").json()
    assert "wrappers" in report["warnings"][0]
    check_merged(merged_files(service, "b", "s"), numbers(model.merge_and_unload()))


TOKEN_ROWS = {
    "list": [1, 39, 3],
    "by-module": {"embed_tokens": [5, 1], "lm_head": [2]},
    "with-lora": [17],
}


@pytest.mark.parametrize("vocabulary", [40, 44])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("case", TOKEN_ROWS)
def test_trainable_tokens(service, tmp_path, case, is_tied, vocabulary):
    from transformers import Qwen3ForCausalLM

    start = qwen3(tie_word_embeddings=is_tied)
    start.save_pretrained(tmp_path / "start")
    start = Qwen3ForCausalLM.from_pretrained(tmp_path / "start")
    if vocabulary > 40:
        start.resize_token_embeddings(vocabulary)
    start.save_pretrained(tmp_path / "bases" / "b")
    model = train(start, trainable_token_indices=TOKEN_ROWS[case], target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    report = upload(service, "s", tmp_path / "adapter")
    assert report.status_code == 201, report.text
    fresh = Qwen3ForCausalLM.from_pretrained(tmp_path / "start")
    fresh.resize_token_embeddings(vocabulary)
    check_reloaded(service, fresh, model, tmp_path / "exported")
    if is_tied and case == "by-module":
        refused = service.get("/v1/bases/b/merged/s")
        assert "ties its head" in refused.json()["detail"]
        return
    check_merged(merged_files(service, "b", "s"), numbers(model.merge_and_unload()))


def qwen3_moe():
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4}
    widths = {"intermediate_size": 48, "moe_intermediate_size": 24, "num_experts_per_tok": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **widths, **heads))


BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = {
    "both": {"target_parameters": BOTH},
    "gate-up": {"target_parameters": BOTH[:1]},
    "down": {"target_parameters": BOTH[1:]},
    "rslora": {"target_parameters": BOTH, "use_rslora": True},
    "patterns": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r".*layers\.1\..*gate_up_proj": 32},
    },
    "router": {"target_parameters": [*BOTH, "mlp.gate.weight"]},
    "one-by-one": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "with-attention": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "all-linear": {"target_modules": "all-linear"},
}


def saved(model, folder):
    """The tensors of a torch model as save_pretrained writes them: experts one by one."""
    model.save_pretrained(folder)
    return safetensors.decode((folder / "model.safetensors").read_bytes())[0]


@pytest.mark.parametrize("case", EXPERTS)
def test_fused_experts(service, tmp_path, case):
    start = qwen3_moe()
    saved(start, tmp_path / "bases" / "moe")
    model = train(start, **{"target_modules": ["q_proj"], **EXPERTS[case]})
    model.save_pretrained(tmp_path / "adapter")
    report = upload(service, "s", tmp_path / "adapter")
    assert report.status_code == 201, report.text
    assert report.json()["warnings"] == []
    check_reloaded(service, qwen3_moe(), model, tmp_path / "exported")
    check_merged(
        merged_files(service, "moe", "s"), saved(model.merge_and_unload(), tmp_path / "merged")
    )


def moe_of(kind):
    """A small model of a class whose checkpoints have other names than its parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 1}
    name = "Llama4TextConfig" if kind == "Llama4" else f"{kind}Config"
    config = getattr(transformers, name)(**sizes, **heads, **experts)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
        ("Mixtral", {"target_modules": "all-linear"}),
        ("Mixtral", {"target_parameters": [*BOTH, "mlp.gate.weight"]}),
        ("GraniteMoe", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("GptOss", {"target_parameters": BOTH}),
        ("Llama4", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    ],
)
def test_experts_of_other_classes(service, tmp_path, kind, options):
    start = moe_of(kind)
    saved(start, tmp_path / "bases" / "moe")
    model = train(start, **options)
    model.save_pretrained(tmp_path / "adapter")
    report = upload(service, "s", tmp_path / "adapter")
    assert report.status_code == 201, report.text
    check_reloaded(service, moe_of(kind), model, tmp_path / "exported")
    check_merged(
        merged_files(service, "moe", "s"), saved(model.merge_and_unload(), tmp_path / "merged")
    )

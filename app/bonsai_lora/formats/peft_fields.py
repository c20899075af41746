"""Every field of peft 0.21's LoraConfig, and what is done with it.

Source: peft 0.21.2, src/peft/tuners/lora/config.py. The table in docs/peft.md is made from FIELDS;
`make test-peers` holds FIELDS against the installed peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Field:
    """What is done with one field of the configuration."""

    policy: Literal["honoured", "ignored", "refused"]
    why: str


FIELDS: Mapping[str, Field] = {
    "task_type": Field("ignored", "says what the model is for, not what the adapter computes"),
    "peft_type": Field("honoured", "must be LORA; other types are refused"),
    "auto_mapping": Field("ignored", "how peft finds the model's class"),
    "peft_version": Field("ignored", "information"),
    "base_model_name_or_path": Field("honoured", "the set's base_model_name"),
    "revision": Field("ignored", "of the base model on a hub"),
    "inference_mode": Field("ignored", "here it is always inference"),
    "r": Field("honoured", "must agree with the tensors, after rank_pattern"),
    "target_modules": Field(
        "honoured",
        "tensors of modules that a list does not name are refused; expressions are kept and "
        "exported, not evaluated: the tensors say what they matched",
    ),
    "exclude_modules": Field("honoured", "tensors of modules that a list names are refused"),
    "lora_alpha": Field("honoured", "numerator of the scaling"),
    "lora_dropout": Field("ignored", "training only; kept and exported"),
    "fan_in_fan_out": Field(
        "honoured", "deltas are transposed where the base stores (in, out), as GPT-2's Conv1D does"
    ),
    "bias": Field("honoured", "replaced biases go into merged weights"),
    "use_rslora": Field("honoured", "scaling is alpha / sqrt(r)"),
    "modules_to_save": Field("honoured", "replaced weights go into merged weights"),
    "init_lora_weights": Field(
        "honoured",
        "pissa, olora, corda, loftq and lora_ga are refused: they changed the base weights, so A "
        "and B do not fit it unless they were converted",
    ),
    "layers_to_transform": Field("honoured", "tensors of other layers are refused"),
    "layers_pattern": Field(
        "honoured", "names in front of the layer's number; an expression is not evaluated"
    ),
    "rank_pattern": Field("honoured", "first matching key wins, and must agree with the tensors"),
    "alpha_pattern": Field(
        "honoured",
        "first matching key wins, as peft matches; keys that need more than linear time "
        "(lookaround, back-references) are refused where the scaling depends on them",
    ),
    "megatron_config": Field("ignored", "how training was spread"),
    "megatron_core": Field("ignored", "how training was spread"),
    "trainable_token_indices": Field(
        "honoured", "replaced rows of embeddings go into merged weights"
    ),
    "loftq_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "eva_config": Field("ignored", "initialisation only"),
    "corda_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "lora_ga_config": Field("ignored", "initialisation only; see init_lora_weights"),
    "use_dora": Field("honoured", "applied where the base is registered; merged"),
    "alora_invocation_tokens": Field(
        "refused", "activated LoRA applies to the tokens after an invocation only"
    ),
    "use_qalora": Field("refused", "pooled inputs are defined for GPTQ weights only"),
    "qalora_group_size": Field("ignored", "only meaningful with use_qalora"),
    "layer_replication": Field("refused", "the depth is changed: layers do not fit the base"),
    "runtime_config": Field("ignored", "never saved by peft"),
    "lora_bias": Field("honoured", "s * (B A x + b); merging needs a base that has a bias"),
    "target_parameters": Field(
        "honoured", "fused experts (3-D parameters): applied per expert, merged, exported"
    ),
    "use_bdlora": Field("refused", "block-diagonal factors are stored in another shape"),
    "arrow_config": Field("refused", "a router over several adapters is not one delta"),
    "ensure_weight_tying": Field("ignored", "what the tensors say is compared when merging"),
    "kasa_config": Field("refused", "KaSA truncates the base weights and adds a diagonal"),
    "velora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
    "monteclora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
}  # fmt: skip
"""Field name -> policy. A refused field is refused only where it is set to a true value."""

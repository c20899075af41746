"""Every field of LoraConfig in peft 0.21, and whether it is honored, ignored or refused.

Source: peft 0.21.2, src/peft/tuners/lora/config.py. The table in docs/peft.md is generated from
FIELDS; `make test-peers` compares FIELDS with the installed peft.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Field:
    """The policy for one field of the configuration."""

    policy: Literal["honored", "ignored", "refused"]
    why: str


FIELDS: Mapping[str, Field] = {
    "task_type": Field("ignored", "purpose of the model, not of the adapter's computation"),
    "peft_type": Field("honored", "must be LORA; other types are refused"),
    "auto_mapping": Field("ignored", "tells peft the model's class"),
    "peft_version": Field("ignored", "informational"),
    "base_model_name_or_path": Field("honored", "the set's base_model_name"),
    "revision": Field("ignored", "of the base model on a hub"),
    "inference_mode": Field("ignored", "always inference"),
    "r": Field("honored", "must agree with the tensors, after rank_pattern"),
    "target_modules": Field(
        "honored",
        "tensors of modules that a list does not name are refused; expressions are kept and "
        "exported but not evaluated, since the tensors show what they matched",
    ),
    "exclude_modules": Field("honored", "tensors of modules that a list names are refused"),
    "lora_alpha": Field("honored", "numerator of the scaling"),
    "lora_dropout": Field("ignored", "training only; kept and exported"),
    "fan_in_fan_out": Field(
        "honored", "deltas are transposed if the base stores (in, out), as for GPT-2's Conv1D"
    ),
    "bias": Field("honored", "replaced biases go into merged weights"),
    "use_rslora": Field("honored", "scaling is alpha / sqrt(r)"),
    "modules_to_save": Field("honored", "replaced weights go into merged weights"),
    "init_lora_weights": Field(
        "honored",
        "pissa, olora, corda, loftq and lora_ga are refused: they change the base weights, so A "
        "and B do not fit the base unless they were converted; so are values that peft 0.21 does "
        "not know",
    ),
    "layers_to_transform": Field("honored", "tensors of other layers are refused"),
    "layers_pattern": Field(
        "honored", "names that precede the layer number; an expression is not evaluated"
    ),
    "rank_pattern": Field("honored", "first matching key wins, and must agree with the tensors"),
    "alpha_pattern": Field(
        "honored",
        "first matching key wins, as peft matches; keys that need more than linear time "
        "(lookaround, back-references) are refused if the scaling depends on them",
    ),
    "megatron_config": Field("ignored", "distribution of the training"),
    "megatron_core": Field("ignored", "distribution of the training"),
    "trainable_token_indices": Field(
        "honored", "replaced rows of embeddings go into merged weights"
    ),
    "loftq_config": Field("ignored", "initialization only; see init_lora_weights"),
    "eva_config": Field("ignored", "initialization only"),
    "corda_config": Field("ignored", "initialization only; see init_lora_weights"),
    "lora_ga_config": Field("ignored", "initialization only; see init_lora_weights"),
    "use_dora": Field("honored", "applied if the base is registered; merged"),
    "alora_invocation_tokens": Field(
        "refused", "activated LoRA applies to the tokens after an invocation only"
    ),
    "use_qalora": Field("refused", "pooled inputs are defined for GPTQ weights only"),
    "qalora_group_size": Field("ignored", "only meaningful with use_qalora"),
    "layer_replication": Field("refused", "changes the depth, so the layers do not fit the base"),
    "runtime_config": Field("ignored", "never saved by peft"),
    "lora_bias": Field("honored", "s * (B A x + b); merging needs a base that has a bias"),
    "target_parameters": Field(
        "honored", "fused experts (3-D parameters): applied per expert, merged, exported"
    ),
    "use_bdlora": Field("refused", "block-diagonal factors have a different shape"),
    "arrow_config": Field("refused", "a router over several adapters is not one delta"),
    "ensure_weight_tying": Field(
        "honored", "a head may have the embedding's adapter, transposed; a tied base adds it once"
    ),
    "kasa_config": Field("refused", "KaSA truncates the base weights and adds a diagonal"),
    "velora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
    "monteclora_config": Field("ignored", "training only: A and B are those of plain LoRA"),
}  # fmt: skip
"""Field name -> policy. A refused field is refused only if it is set to a true value."""

"""Tied embeddings: one tensor of the base that is two modules in peft."""

from collections.abc import Mapping

import numpy as np

from bonsai_lora.checkpoints.base import Base
from bonsai_lora.core.adapter import find_transposed
from bonsai_lora.core.cast import Array
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import UnsupportedAdapterError
from bonsai_lora.formats.peft_keys import TOKEN_ROWS
from bonsai_lora.formats.peft_options import BaseOptions

_HEADS = frozenset({"lm_head", "embed_out"})
_EMBEDDINGS = frozenset(
    {
        "embed_tokens",
        "wte",
        "embed_in",
        "word_embeddings",
        "shared",
        "embeddings",
        "tok_embeddings",
        "tokens_embed",
        "word_embedding",
    }
)
_ENDS = (TOKEN_ROWS, ".weight", ".bias")


def tied_replacements(
    base: Base, lora_set: BonsaiLoraSet, options: BaseOptions
) -> tuple[Mapping[str, Array], bool]:
    """Return the replaced parameters of a set, and whether a tied head must be untied for them.

    A tied base has no tensor for its head. A replaced head that equals the replaced embedding adds
    nothing: peft saves both after the vocabulary was resized. Raises UnsupportedAdapterError if
    head and embedding would differ and the base cannot be untied: one tensor cannot hold both.
    """
    replacements = lora_set.replacements
    if not _is_one_tensor(base):
        return replacements, False
    tied = tied_adapters(base, lora_set)
    adapted = [
        name
        for name in lora_set.registry.adapters
        if _last(name) in _HEADS | _EMBEDDINGS and name not in {*tied, *tied.values()}
    ]
    heads = {_ending(name): name for name in replacements if _last(_module(name)) in _HEADS}
    embeddings = {
        _ending(name): name for name in replacements if _last(_module(name)) in _EMBEDDINGS
    }
    own = [name for name in embeddings.values() if options.is_saved(_module(name))]
    differing = [*adapted, *(own if not heads else ())]
    for ending, head in heads.items():
        other = embeddings.get(ending)
        if other is None or not _is_equal(head, other, replacements, options):
            differing += [head, *([other] if other else [])]
    if not differing:
        kept = {name: one for name, one in replacements.items() if name not in heads.values()}
        return kept, False
    # Replaced rows of the embedding alone are those of the head, too.
    if base.can_untie and (heads or TOKEN_ROWS not in embeddings):
        return replacements, True
    raise _differs(base, differing)


def tied_adapters(base: Base, lora_set: BonsaiLoraSet) -> Mapping[str, str]:
    """Return the adapted heads of a tied base that its adapted embedding changes already.

    With ensure_weight_tying peft saves the embedding's adapter a second time, transposed, for the
    head. Head -> embedding.
    """
    if not _is_one_tensor(base):
        return {}
    adapters = lora_set.registry.adapters
    heads, embeddings = (
        {
            name: (one.a_matrix, one.b_matrix)
            for name, one in adapters.items()
            if one.layer == layer and one.bias is None and one.magnitude is None
        }
        for layer in ("linear", "embedding")
    )
    return {
        head: embedding
        for head, embedding in find_transposed(heads, embeddings).items()
        if adapters[head].scaling == adapters[embedding].scaling
    }


def _is_one_tensor(base: Base) -> bool:
    """Return whether the embedding's tensor is also the head's."""
    if not base.is_tied:
        return False
    return base.can_untie or all(_last(_module(one)) not in _HEADS for one in base.tensor_names)


def is_embedding(parameter: str) -> bool:
    """Return whether a replaced parameter is the embedding or its rows."""
    return _last(_module(parameter)) in _EMBEDDINGS


def _is_equal(
    head: str, embedding: str, replacements: Mapping[str, Array], options: BaseOptions
) -> bool:
    if head.endswith(TOKEN_ROWS) and list(options.rows_of(_module(head))) != list(
        options.rows_of(_module(embedding))
    ):
        return False
    return np.array_equal(replacements[head], replacements[embedding])


def _module(parameter: str) -> str:
    for ending in _ENDS:
        if parameter.endswith(ending):
            return parameter.removesuffix(ending)
    return parameter


def _ending(parameter: str) -> str:
    return parameter.removeprefix(_module(parameter))


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _differs(base: Base, names: list[str]) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"base {base.name!r} ties its head to its embedding, but the set changes "
        f"{', '.join(sorted(names))} so that the two would differ; untie the base first (save it "
        "with tie_word_embeddings false and a separate head)",
        modules=sorted(names),
        base=base.name,
    )

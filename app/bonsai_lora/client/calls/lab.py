"""The laboratory: combine sets, compare them, look at their spectra."""

from collections.abc import Sequence
from typing import Any, Unpack

from bonsai_lora.client.answers import (
    CombinedSet,
    CombineOptions,
    CombineReport,
    Comparison,
    SetSpectrum,
    SetSurvival,
    Weights,
)
from bonsai_lora.client.call import (
    Call,
    decode_json,
    decode_tagged,
    json_body,
    mix_query,
    path_of,
    query_of,
)


def combine(
    name: str, sets: Weights, *, method: str = "exact", **options: Unpack[CombineOptions]
) -> Call[CombinedSet]:
    """Make a new set from others, each times its weight, and return it with a report.

    `method` is one of docs/laboratory.md, and `options` are those that it takes. Raises
    SetExistsError, SetNotFoundError, InvalidRequestError, and UnsupportedAdapterError for DoRA,
    biases and replaced parameters.
    """
    body = json_body(_body(name, sets, method, options))
    return Call(method="POST", path="/v1/combine", decode=decode_tagged, **body)


def preview_combine(
    name: str, sets: Weights, *, method: str = "exact", **options: Unpack[CombineOptions]
) -> Call[CombineReport]:
    """Return the report that `combine` would give; nothing is stored."""
    return Call(
        method="POST",
        path="/v1/combine",
        query=query_of(dry_run=True),
        decode=decode_json,
        is_pure=True,
        **json_body(_body(name, sets, method, options)),
    )


def _body(name: str, sets: Weights, method: str, options: CombineOptions) -> dict[str, Any]:
    given = {key: value for key, value in options.items() if value is not None}
    parts = [{"set": one, "weight": weight} for one, weight in sets.items()]
    return {"name": name, "sets": parts, "method": method, **given}


def compare(sets: Sequence[str]) -> Call[Comparison]:
    """Return norms, cosines and interference of up to 64 sets, whole and by module."""
    return Call(
        method="GET",
        path="/v1/compare",
        query=[("set", name) for name in sets],
        decode=decode_json,
        is_pure=True,
    )


def get_spectrum(name: str, *, modules: Sequence[str] = ()) -> Call[SetSpectrum]:
    """Return singular values, norms and ranks of a set's deltas, or of some `modules` only."""
    return Call(
        method="GET",
        path="/v1" + path_of("sets", name, "spectrum"),
        query=[("module", module) for module in modules],
        decode=decode_json,
        is_pure=True,
    )


def get_survival(
    base: str,
    name: str,
    *,
    dtype: str | None = None,
    scale: float = 1.0,
    sets: Weights | None = None,
    match: str | None = None,
) -> Call[SetSurvival]:
    """Return an estimate of what is left of a set's deltas in merged weights of a `dtype`.

    BF16 (the default), F16, Q8_0 or Q1_0. `scale`, `sets` and `match` as for merged files. Raises
    BaseNotFoundError, SetNotFoundError.
    """
    return Call(
        method="GET",
        path="/v1" + path_of("bases", base, "survival", name),
        query=[*query_of(dtype=dtype), *mix_query(scale, sets, match)],
        decode=decode_json,
        is_pure=True,
    )

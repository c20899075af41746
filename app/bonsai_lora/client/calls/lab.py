"""The laboratory: combine sets, compare and extract them, look at their spectra."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Unpack

from bonsai_lora.client.answers import Weights
from bonsai_lora.client.call import (
    Call,
    MixOptions,
    checked_names,
    decode_tagged,
    given,
    header_lines,
    json_body,
    mix_query,
    path_of,
    query_of,
    weighted,
)
from bonsai_lora.client.lab_answers import (
    CombinedSet,
    CombineOptions,
    CombineReport,
    Comparison,
    Job,
    SetSpectrum,
    SetSurvival,
)

_ASYNC = header_lines(prefer="respond-async")


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
        is_pure=True,
        **json_body(_body(name, sets, method, options)),
    )


def start_combine(
    name: str,
    sets: Weights,
    *,
    method: str = "exact",
    dry_run: bool = False,
    **options: Unpack[CombineOptions],
) -> Call[Job]:
    """Start what `combine` does, or with `dry_run` what `preview_combine` does, and return the job.

    Raises the refusals of `combine` that need no computation.
    """
    body = json_body(_body(name, sets, method, options), prefer="respond-async")
    query = query_of(dry_run=dry_run or None)
    return Call(method="POST", path="/v1/combine", query=query, **body)


def start_extract(
    name: str,
    base: str,
    tuned: str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] = (),
) -> Call[Job]:
    """Start to extract a set from a fine-tuned model and its base, both bases of the service.

    `rank` is that of each module; with `energy`, it is the highest. The result of the job is an
    `ExtractedSet`. Raises BaseNotFoundError, SetExistsError, ShapeMismatchError.
    """
    wanted = given(
        rank=rank, energy=energy, modules=list(checked_names(modules, "modules")) or None
    )
    body = json_body({"name": name, "base": base, "tuned": tuned, **wanted})
    return Call(method="POST", path="/v1/extract", **body)


def _body(name: str, sets: Weights, method: str, options: CombineOptions) -> dict[str, Any]:
    return {"name": name, "sets": weighted(sets), "method": method, **given(**options)}


def compare(sets: Sequence[str]) -> Call[Comparison]:
    """Return norms, cosines and interference of up to 64 sets, whole and by module."""
    return Call(path="/v1/compare", query=[("set", name) for name in checked_names(sets)])


def start_compare(sets: Sequence[str]) -> Call[Job | Comparison]:
    """Begin what `compare` does, and return the job; if it takes no second, what `compare` returns.

    `wait_for` takes either.
    """
    return replace(compare(sets), headers=_ASYNC)


def get_spectrum(
    name: str, *, modules: Sequence[str] = (), version: int | None = None
) -> Call[SetSpectrum]:
    """Return singular values, norms and ranks of a set's deltas, or of some `modules` only."""
    return Call(
        path=path_of("v1", "sets", name, "spectrum"),
        query=[
            *query_of(version=version),
            *(("module", one) for one in checked_names(modules, "modules")),
        ],
    )


def start_spectrum(
    name: str, *, modules: Sequence[str] = (), version: int | None = None
) -> Call[Job | SetSpectrum]:
    """Begin what `get_spectrum` does, and return as `start_compare`."""
    return replace(get_spectrum(name, modules=modules, version=version), headers=_ASYNC)


def get_survival(
    base: str, name: str, *, dtype: str | None = None, **mix: Unpack[MixOptions]
) -> Call[SetSurvival]:
    """Return an estimate of what is left of a set's deltas in merged weights of a `dtype`.

    BF16 (the default), F16, Q8_0, Q1_0, Q2_0, TQ1_0 or TQ2_0. `scale`, `sets` and `match` as for
    merged files. Raises BaseNotFoundError, SetNotFoundError.
    """
    return Call(
        path=path_of("v1", "bases", base, "survival", name),
        query=[*query_of(dtype=dtype), *mix_query(**mix)],
    )


def start_survival(
    base: str, name: str, *, dtype: str | None = None, **mix: Unpack[MixOptions]
) -> Call[Job]:
    """Start to compute exactly what `get_survival` estimates, and return the job."""
    return Call(
        method="POST",
        path=path_of("v1", "bases", base, "survival", name),
        query=[*query_of(dtype=dtype), *mix_query(**mix)],
    )

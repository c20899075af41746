"""The JSON of the laboratory as pydantic models; their docstrings appear in OpenAPI."""

import math
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, Field, FiniteFloat

from bonsai_lora.api.schemas import InfoModel, Names, RequestModel, SetInfo
from bonsai_lora.checkpoints.extraction import Change, Kind
from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.combine import Loss
from bonsai_lora.core.factors import rank_for
from bonsai_lora.core.recipe import Method, Recipe, Sign
from bonsai_lora.core.similarity import Similarity
from bonsai_lora.core.spectrum import effective_rank, singular_values
from bonsai_lora.service.aligned import MAX_SETS
from bonsai_lora.service.combine import Report
from bonsai_lora.service.compare import Comparison, ModuleComparison
from bonsai_lora.service.extract import Report as Extraction
from bonsai_lora.service.spectrum import Spectra
from bonsai_lora.service.survival import Followed, StoredDtype, Survival
from bonsai_lora.storage.setfile import StoredSet

Rank = Annotated[int, Field(ge=1, le=2**31 - 1)]
Weight = Annotated[FiniteFloat, Field(ge=-1e30, le=1e30)]
Share = Annotated[float, Field(gt=0, le=1)]


class CombineInput(RequestModel):
    """A set and its weight in a combination."""

    set: str
    weight: Weight = 1.0


class CombineSets(RequestModel):
    """A combination of sets; options that the method does not take are refused."""

    name: str = Field(description="name of the new set")
    sets: list[CombineInput] = Field(min_length=1, max_length=MAX_SETS)
    method: Method = Field("exact", description="docs/laboratory.md defines them")
    rank: Rank | None = Field(None, description="highest rank of the new set's modules")
    energy: Share | None = Field(
        None,
        description="choose the rank of each module so that it keeps this share of the sum of "
        "squared singular values",
    )
    density: Share | None = Field(None, description="share of the entries that are kept")
    sign: Sign | None = Field(
        None, description="elect signs by the sum of entries (total) or their number (frequency)"
    )
    gamma: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="breadcrumbs: share of the largest entries that are dropped (0.01)"
    )
    epsilon: Share | None = Field(
        None, description="della: half the range of the probabilities to keep an entry (0.15)"
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = Field(
        None, description="of methods that draw at random (0)"
    )

    def recipe(self) -> Recipe:
        """Return the core's recipe; raises InvalidRequestError."""
        return Recipe(**self.model_dump(exclude={"name", "sets"}))


class CombinedModule(BaseModel):
    """What the combination of one module lost."""

    name: str
    rank: int
    energy_kept: float
    relative_error: float


class CombineReport(BaseModel):
    """What a combination lost."""

    method: Method
    rank: int = Field(description="highest rank of a module")
    energy_kept: float = Field(
        description="share of the sum of squared singular values that the ranks keep"
    )
    relative_error: float = Field(
        description="Frobenius norm of the difference to what the method defines, over its norm; "
        "for linear, ties, dare_linear, dare_ties and magnitude_prune, to the weighted sum"
    )
    warnings: list[str]
    modules: list[CombinedModule]

    @classmethod
    def of(cls, report: Report) -> "CombineReport":
        """Return the schema of a report."""
        return cls(
            method=report.recipe.method,
            rank=report.rank,
            **_kept(report.loss),
            warnings=report.warnings,
            modules=[
                CombinedModule(name=name, rank=one.adapter.rank, **_kept(one.loss))
                for name, one in report.modules.items()
            ],
        )


def _kept(loss: Loss) -> dict[str, float]:
    return {"energy_kept": loss.energy_kept, "relative_error": loss.relative_error}


class CombinedSet(SetInfo):
    """The set that a combination made."""

    report: CombineReport

    @classmethod
    def made(cls, stored: StoredSet, report: Report) -> "CombinedSet":
        """Return the schema of a new set with its report."""
        return cls(**dict(SetInfo.of(stored)), report=CombineReport.of(report))


class ExtractSet(RequestModel):
    """A set to extract from a fine-tuned model; needs `rank` or `energy`."""

    name: str = Field(description="name of the new set")
    base: str = Field(description="name of the base from which the model was tuned")
    tuned: str = Field(description="name of the fine-tuned model, which is among the bases too")
    rank: Rank | None = Field(None, description="rank; with `energy`, the highest (128)")
    energy: Share | None = Field(
        None,
        description="choose the rank of each module so that it keeps this share of the sum of "
        "squared singular values",
    )
    modules: Names = Field(
        [], description="only these, by full name or last components; empty for all"
    )


class ExtractedTensor(BaseModel):
    """What became of a tensor that the fine-tuning changed."""

    name: str = Field(description="of the tensor")
    kind: Kind = Field(
        description="a LoRA; token_rows: the changed rows of an embedding; replaced: the whole "
        "tensor, which is smaller; left_out: it cannot be part of an adapter"
    )
    rank: int | None = Field(description="of a LoRA")
    rows: int | None = Field(description="of token_rows")
    delta_norm: float = Field(description="Frobenius norm of the difference")
    relative_norm: float | None = Field(description="over the norm of the base's tensor, if not 0")
    energy_kept: float
    relative_error: float = Field(
        description="Frobenius norm of what is left out, over that of the difference"
    )

    @classmethod
    def of(cls, change: Change) -> "ExtractedTensor":
        """Return the schema of a change."""
        return cls(
            name=change.pair.name,
            kind=change.kind,
            rank=None if change.adapter is None else change.adapter.rank,
            rows=None if change.rows is None else len(change.rows),
            delta_norm=math.sqrt(change.square),
            relative_norm=math.sqrt(change.square / change.base_square)
            if change.base_square
            else None,
            **_kept(change.loss),
        )


class ExtractReport(BaseModel):
    """What an extraction found, and what it lost."""

    rank: int = Field(description="highest rank of a module")
    energy_kept: float = Field(description="share of the squared Frobenius norm of all differences")
    relative_error: float = Field(
        description="Frobenius norm of what is left out, over that of all differences"
    )
    same: int = Field(description="tensors that are the same in both models")
    warnings: list[str]
    modules: list[ExtractedTensor]


class ExtractedSet(SetInfo):
    """The set that an extraction made."""

    report: ExtractReport

    @classmethod
    def made(cls, stored: StoredSet, report: Extraction) -> "ExtractedSet":
        """Return the schema of a new set with its report."""
        found = ExtractReport(
            rank=report.rank,
            **_kept(report.loss),
            same=report.same,
            warnings=report.warnings,
            modules=[ExtractedTensor.of(one) for one in report.changes],
        )
        return cls(**dict(SetInfo.of(stored)), report=found)


Norms = Annotated[list[float], Field(description="Frobenius norms, in the order of the sets")]
Cosines = Annotated[list[list[float]], Field(description="0 with a delta that is zero")]
Interference = Annotated[
    float,
    Field(
        description="1 - |sum|^2 / (sum of norms)^2: 0 if all deltas point one way, 1 - 1/n for n "
        "orthogonal ones of the same norm, near 1 if they cancel"
    ),
]


class ComparedModule(BaseModel):
    """The deltas of one module."""

    name: str
    norms: Norms
    cosine: Cosines
    interference: Interference
    subspace_similarity: float | None = Field(
        description="of two sets: overlap of their right singular vectors, from 0 to 1 (Hu et al. "
        "2021, equation 4); null if a set lacks the module, or for more sets"
    )


class ComparisonInfo(BaseModel):
    """The deltas of several sets."""

    sets: list[str]
    norms: Norms
    cosine: Cosines
    interference: Interference
    modules: list[ComparedModule]

    @classmethod
    def of(cls, comparison: Comparison, modules: Sequence[ModuleComparison]) -> "ComparisonInfo":
        """Return the schema of a comparison."""
        return cls(
            sets=list(comparison.names),
            **_figures(comparison.whole(modules)),
            modules=[
                ComparedModule(
                    name=name,
                    **_figures(one.similarity),
                    subspace_similarity=one.subspace_similarity,
                )
                for name, one in zip(comparison.modules, modules, strict=True)
            ],
        )


def _figures(found: Similarity) -> dict[str, Any]:
    return {
        "norms": found.norms.tolist(),
        "cosine": found.cosine.tolist(),
        "interference": found.interference,
    }


class ModuleSpectrum(BaseModel):
    """The singular values of scaling * B @ A."""

    name: str
    rank: int
    singular_values: list[float] = Field(description="largest first; of fused experts all of them")
    frobenius_norm: float
    spectral_norm: float = Field(description="the largest singular value")
    stable_rank: float = Field(description="squared Frobenius over squared spectral norm")
    effective_rank: float = Field(
        description="exp of the entropy of the normalized singular values (Roy and Vetterli 2007)"
    )
    energy_rank_90: int = Field(description="fewest values with 90 % of the sum of squares")
    energy_rank_99: int = Field(description="fewest values with 99 % of the sum of squares")

    @classmethod
    def of(cls, name: str, adapter: LoraAdapter) -> "ModuleSpectrum":
        """Return the schema of an adapter's spectrum."""
        values = singular_values(adapter)
        most = float(values[0]) if len(values) else 0.0
        norm = float(np.linalg.norm(values))
        return cls(
            name=name,
            rank=adapter.rank,
            singular_values=values.tolist(),
            frobenius_norm=norm,
            spectral_norm=most,
            stable_rank=(norm / most) ** 2 if most else 0.0,
            effective_rank=effective_rank(adapter),
            energy_rank_90=rank_for(values, 0.9),
            energy_rank_99=rank_for(values, 0.99),
        )


class SetSpectrum(BaseModel):
    """The singular values of a set's deltas."""

    modules: list[ModuleSpectrum]

    @classmethod
    def of(cls, spectra: Spectra) -> "SetSpectrum":
        """Return the schema of spectra that have been computed."""
        return cls(modules=[ModuleSpectrum.of(*one) for one in spectra.adapters.items()])


class SurvivalFigures(InfoModel):
    """What is left of deltas D as D', the difference that they make to the stored weights."""

    unchanged: float = Field(description="share of the entries with D' = 0")
    gain: float = Field(description="<D', D> / |D|^2: 1 if the deltas survive, 0 if nothing does")
    relative_error: float = Field(description="|D' - D| / |D|")


class TensorSurvival(SurvivalFigures):
    """What is left of the delta of one tensor of the base."""

    name: str


class SurvivalInfo(SurvivalFigures):
    """What is left of a set's deltas."""

    dtype: StoredDtype
    exact: bool = Field(description="whether all rows were stored, and not a sample")
    modules: list[TensorSurvival]
    skipped: list[str] = Field(
        description="changed tensors that are not followed: replaced ones, DoRA, stacked experts, "
        "and rows that are no whole blocks of the type"
    )

    @classmethod
    def of(cls, followed: Followed, found: Sequence[Survival], *, is_exact: bool) -> "SurvivalInfo":
        """Return the schema of what was found of each tensor."""
        return cls(
            dtype=followed.dtype,
            exact=is_exact,
            **_survival(sum(found, Survival())),
            modules=[
                TensorSurvival(name=name, **_survival(one))
                for name, one in zip(followed.tensors, found, strict=True)
            ],
            skipped=list(followed.skipped),
        )


def _survival(found: Survival) -> dict[str, float]:
    return {name: getattr(found, name) for name in SurvivalFigures.model_fields}

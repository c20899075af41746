"""What the laboratory and jobs answer: dictionaries with typed keys."""

from typing import Any, TypedDict

from bonsai_lora.client.answers import SetInfo


class CombineOptions(TypedDict, total=False):
    """Options of a combination; those that the method does not take are refused."""

    rank: int | None
    energy: float | None
    density: float | None
    sign: str | None
    gamma: float | None
    epsilon: float | None
    seed: int | None


class CombinedModule(TypedDict):
    """What the combination of one module lost."""

    name: str
    rank: int
    energy_kept: float
    relative_error: float


class CombineReport(TypedDict):
    """What a combination lost."""

    method: str
    rank: int
    energy_kept: float
    relative_error: float
    warnings: list[str]
    modules: list[CombinedModule]


class CombinedSet(SetInfo):
    """The set that a combination made, and its report."""

    report: CombineReport


class ComparedModule(TypedDict):
    """One module of several sets."""

    name: str
    norms: list[float]
    cosine: list[list[float]]
    interference: float
    subspace_similarity: float | None


class Comparison(TypedDict):
    """Several sets, whole and by module."""

    sets: list[str]
    norms: list[float]
    cosine: list[list[float]]
    interference: float
    modules: list[ComparedModule]


class ModuleSpectrum(TypedDict):
    """The singular values of one delta, largest first."""

    name: str
    rank: int
    singular_values: list[float]
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float
    energy_rank_90: int
    energy_rank_99: int


class SetSpectrum(TypedDict):
    """The singular values of a set's deltas."""

    modules: list[ModuleSpectrum]


class TensorSurvival(TypedDict):
    """What is left of the delta of one tensor of the base."""

    name: str
    unchanged: float
    gain: float
    relative_error: float


class SetSurvival(TypedDict):
    """What is left of a set's deltas in stored merged weights."""

    dtype: str
    exact: bool
    unchanged: float
    gain: float
    relative_error: float
    modules: list[TensorSurvival]
    skipped: list[str]


class ExtractedTensor(TypedDict):
    """What became of a tensor that a fine-tuning changed."""

    name: str
    kind: str
    rank: int | None
    rows: int | None
    delta_norm: float
    relative_norm: float | None
    energy_kept: float
    relative_error: float


class ExtractReport(TypedDict):
    """What an extraction found, and what it lost."""

    rank: int
    energy_kept: float
    relative_error: float
    same: int
    warnings: list[str]
    modules: list[ExtractedTensor]


class ExtractedSet(SetInfo):
    """The set that an extraction made, and its report."""

    report: ExtractReport


class Job(TypedDict):
    """Work that goes on after the answer to its request."""

    id: str
    kind: str
    state: str
    """queued, running, done, failed or cancelled."""
    created_at: str
    progress: float
    eta_seconds: float | None
    result: dict[str, Any] | None
    error: dict[str, Any] | None


class JobPage(TypedDict):
    """Jobs, the newest first, without their results."""

    jobs: list[Job]
    next_cursor: str | None

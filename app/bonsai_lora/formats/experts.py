"""Fused experts: adapters of 3-D parameters (peft's target_parameters).

peft wraps the module once per parameter and names A and B after the wrappers: the innermost,
`…experts.base_layer.lora_A`, belongs to the first parameter of the module, the outermost,
`…experts.lora_A`, to the last. A is (E*r, d_in), with the r rows of expert e together; B is
(d_out, r*E), with column q*E + e for expert e (peft 0.21, tuners/lora/layer.py, ParamWrapper). peft
0.17 and 0.18 read (E, out, in) parameters as (E, in, out), which exchanges the roles of A and B.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from bonsai_lora.core.cast import Array
from bonsai_lora.errors import InvalidAdapterError, UnsupportedAdapterError
from bonsai_lora.formats.names import endings

ExpertLayout = Literal["rank_major", "grouped_by_expert"]

LAYOUT_FIELD = "lora_B_layout"
"""Field in which newer versions of unsloth record the column order of B."""
FIRST_RIGHT_VERSION = "0.19.0"
"""First peft version that reads (E, out, in) parameters correctly."""
_RIGHT = (0, 19)

_INNER = ".base_layer"
_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "input_linear", "down_proj", "output_linear")
"""Order in which the classes of transformers 5 register their parameters."""
_WEIGHT = "weight"
_VERSION = re.compile(r"(\d+)\.(\d+)")


def targeted_parameters(
    targets: Iterable[str], modules: Iterable[str], is_linear: Callable[[str], bool]
) -> dict[str, str]:
    """Return the parameter that A and B adapt, for each module named by target_parameters.

    `targets` are target_parameters, suffixes of parameter names. A suffix without a module, such as
    `gate_up_proj`, means the parameters of all modules but those that `is_linear`. Raises
    InvalidAdapterError if wrappers and target_parameters contradict each other,
    UnsupportedAdapterError if the parameter of a wrapper cannot be determined.
    """
    leaves: dict[str, set[str]] = {}
    for target in targets:
        leaves.setdefault(target.rpartition(".")[0], set()).add(target.rpartition(".")[2])
    wrappers: dict[str, list[str]] = {}
    for module in modules:
        wrappers.setdefault(_unwrapped(module), []).append(module)
    found: dict[str, str] = {}
    for core, names in wrappers.items():
        parameters = _ordered(core, _leaves_of(core, leaves, is_linear))
        depths = {name: (len(name) - len(core)) // len(_INNER) for name in names}
        if not parameters and names == [core]:
            continue  # not fused
        if max(depths.values()) >= len(parameters):
            raise InvalidAdapterError(
                f"{core!r} has an adapter inside {max(depths.values())} others, but "
                f"target_parameters names {', '.join(parameters) or 'none'} of its parameters; "
                "correct target_parameters",
                field="target_parameters",
                module=core,
            )
        found |= {name: f"{core}.{parameters[-1 - depth]}" for name, depth in depths.items()}
    return found


def _leaves_of(
    core: str, leaves: Mapping[str, set[str]], is_linear: Callable[[str], bool]
) -> set[str]:
    """Return the last parts of the targeted parameters of one module."""
    found = {one for path in endings(core) for one in leaves.get(path, ())}
    if _WEIGHT in found:  # such a module has no other parameter to adapt
        return {_WEIGHT}
    bare = leaves.get("", set())
    return found | bare if bare and not is_linear(core) else found


def _unwrapped(module: str) -> str:
    while module.endswith(_INNER):
        module = module.removesuffix(_INNER)
    return module


def _ordered(core: str, parameters: set[str]) -> list[str]:
    """Return the parameters of one module in the order of registration."""
    if len(parameters) < 2:
        return list(parameters)
    if not parameters <= {*_ORDER}:
        raise UnsupportedAdapterError(
            f"target_parameters names {', '.join(sorted(parameters))} of {core!r}, whose order "
            f"is unknown; expected names among {', '.join(_ORDER)}",
            field="target_parameters",
            module=core,
        )
    return sorted(parameters, key=_ORDER.index)


def is_swapped(raw: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Return whether A and B of fused experts are exchanged, as peft before 0.19 wrote them.

    `shapes` are (d_in, d_out) of the parameters of one module: gate_up_proj must have the input
    width that down_proj outputs, and twice its input width as outputs. If that is inconclusive,
    peft_version decides.
    """
    gate_up, down = shapes.get("gate_up_proj"), shapes.get("down_proj")
    if gate_up is not None and down is not None:
        (a_in, a_out), (b_in, b_out) = gate_up, down
        is_right = a_in == b_out and a_out == 2 * b_in
        is_wrong = a_out == b_in and a_in == 2 * b_out
        if is_right != is_wrong:
            return is_wrong
    version = _version(raw)
    return version is not None and version < _RIGHT


def is_kept_swapped(raw: Mapping[str, Any]) -> bool:
    """Return whether exchanged A and B are right, because the class stores (E, in, out)."""
    return (_version(raw) or (0, 0)) >= _RIGHT


def _version(raw: Mapping[str, Any]) -> tuple[int, int] | None:
    version = _VERSION.match(str(raw.get("peft_version") or ""))
    return None if version is None else (int(version[1]), int(version[2]))


def swapped(a_matrix: Array, b_matrix: Array, experts: int) -> tuple[Array, Array]:
    """Return A and B of the transposed deltas."""
    rank = len(a_matrix) // experts
    d_in, d_out = a_matrix.shape[1], len(b_matrix)
    right = b_matrix.reshape(d_out, rank, experts).transpose(2, 1, 0).reshape(-1, d_out)
    left = a_matrix.reshape(experts, rank, d_in).transpose(2, 1, 0).reshape(d_in, -1)
    return right, left


def rank_major(b_matrix: Array, experts: int) -> Array:
    """Reorder the columns of B from e*r + q (by expert) to peft's q*E + e."""
    d_out, columns = b_matrix.shape
    grouped = b_matrix.reshape(d_out, experts, columns // experts)
    return grouped.transpose(0, 2, 1).reshape(d_out, columns)


def layout_of(raw: Mapping[str, Any], asked: ExpertLayout | None) -> ExpertLayout:
    """Return the column order of B: as requested, else as configured, else rank-major."""
    layout = asked or raw.get(LAYOUT_FIELD) or "rank_major"
    if layout not in ("rank_major", "grouped_by_expert"):
        raise InvalidAdapterError(
            f"{LAYOUT_FIELD} is {str(layout)[:100]!r}; expected rank_major or grouped_by_expert",
            field=LAYOUT_FIELD,
        )
    return layout


def may_be_grouped(raw: Mapping[str, Any]) -> bool:
    """Return whether unsloth wrote the configuration without the column order of B."""
    mapping = raw.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    return LAYOUT_FIELD not in raw and ("unsloth_fixed" in raw or "unsloth" in str(library))

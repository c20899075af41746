"""Check the expert numbers of an apply to fused experts."""

from collections.abc import Mapping, Sequence

import numpy as np

from bonsai_lora.core.adapter import LoraAdapter
from bonsai_lora.core.batch import Integers
from bonsai_lora.errors import InvalidRequestError, ShapeMismatchError, counted


def check_experts(
    adapters: Mapping[str, Sequence[LoraAdapter]], rows: Mapping[str, int], experts: Integers | None
) -> None:
    """Raise unless `experts` has a valid number for each row of all fused modules.

    `adapters` and `rows` (the number of rows) are by module. Raises InvalidRequestError if the
    numbers are missing, out of range, or given although no module is fused, ShapeMismatchError if
    there are more or fewer than rows.
    """
    is_fused = False
    for module, some in adapters.items():
        for one in some:
            if one.experts is not None:
                is_fused = True
                _check_module(module, one.experts, rows[module], experts)
    if experts is not None and not is_fused:
        raise InvalidRequestError(
            f"the request has experts, but {', '.join(list(adapters)[:8])} is not fused; remove "
            "experts",
            field="experts",
        )


def _check_module(module: str, count: int, rows: int, experts: Integers | None) -> None:
    if experts is None:
        raise InvalidRequestError(
            f"module {module!r} has {count} fused experts; send `experts`, the number of the "
            "expert of each row, with the inputs",
            module=module,
            field="experts",
        )
    if len(experts) != rows:
        raise ShapeMismatchError(
            f"experts has {counted(len(experts), 'number')}, but {module!r} has "
            f"{counted(rows, 'row')}; send one number per row",
            module=module,
            got=len(experts),
            expected=rows,
        )
    wrong = np.flatnonzero((experts < 0) | (experts >= count))
    if wrong.size:
        raise InvalidRequestError(
            f"experts[{wrong[0]}] is {experts[wrong[0]]}, but {module!r} has "
            f"{counted(count, 'expert')}; expected 0 to {count - 1}",
            module=module,
            row=int(wrong[0]),
            got=int(experts[wrong[0]]),
        )

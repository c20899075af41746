"""Check set files as uploads are checked: another program may have written them."""

import numpy as np

from bonsai_lora.core.adapter import check_factors
from bonsai_lora.core.cast import Array, all_finite
from bonsai_lora.core.loraset import BonsaiLoraSet
from bonsai_lora.errors import BonsaiLoraError, MalformedSafetensorsError
from bonsai_lora.formats.peft import set_tensors


def check_shapes(
    module: str, a_matrix: Array, b_matrix: Array, bias: Array | None, magnitude: Array | None
) -> None:
    """Raise MalformedSafetensorsError unless the tensors of a module fit together."""
    try:
        check_factors(a_matrix, b_matrix)
    except BonsaiLoraError as error:
        raise MalformedSafetensorsError(f"module {module!r}: {error.detail}") from None
    for what, vector in (("bias", bias), ("magnitude", magnitude)):
        if vector is not None and vector.shape != (len(b_matrix),):
            raise MalformedSafetensorsError(
                f"module {module!r} has a {what} of shape {list(vector.shape)}; expected "
                f"{[len(b_matrix)]}"
            )


def check_values(lora_set: BonsaiLoraSet) -> None:
    """Raise MalformedSafetensorsError for what an upload may not have: float64, NaN, infinity."""
    for name, array in set_tensors(lora_set).items():
        if array.dtype == np.float64:
            raise MalformedSafetensorsError(f"{name} is F64; expected F32, F16 or BF16")
        if not all_finite(array):
            raise MalformedSafetensorsError(f"{name} has NaN or infinity; expected finite numbers")

"""Check that inputs are finite."""

import numpy as np

from bonsai_lora.core.cast import Floats, all_finite
from bonsai_lora.errors import NonFiniteInputError


def check_finite(array: Floats, name: str) -> None:
    """Raise NonFiniteInputError with the index of the first NaN or infinity in `array`."""
    if all_finite(array):
        return
    flat = int(np.argmin(np.isfinite(array)))
    place = [int(index) for index in np.unravel_index(flat, array.shape)]
    where = name + "".join(f"[{index}]" for index in place)
    kind = "NaN" if np.isnan(array.flat[flat]) else "infinite as a float32"
    raise NonFiniteInputError(
        f"{where} is {kind}; send only numbers that are finite in float32", field=name, index=place
    )

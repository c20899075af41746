"""Each GGUF type as float32, against a plain copy of as many bytes."""

from measure import in_turns, report

import numpy as np

from bonsai_lora.formats.dequantize import can_dequantize, dequantize
from bonsai_lora.formats.gguf_types import BY_NAME
from bonsai_lora.formats.hadamard import Folding
from bonsai_lora.formats.quantize import quantize_q8_0

VALUES = 1 << 23
"""32 MiB of float32, more than the caches of a core."""
FOLDED_WIDTH = 1024


def main() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(VALUES).astype(np.float32)
    out = np.empty_like(values)
    runs = {"copy": lambda: np.copyto(out, values)}
    for kind in filter(can_dequantize, BY_NAME.values()):
        raw = rng.integers(0, 100, kind.bytes_of(VALUES)).astype(np.uint8)
        runs[kind.name] = lambda kind=kind, raw=raw: dequantize(kind, raw, out)
    runs["to Q8_0"] = lambda: quantize_q8_0(values)
    folding = Folding(FOLDED_WIDTH, {FOLDED_WIDTH: np.ones(FOLDED_WIDTH, np.float32)})
    rows = values.reshape(-1, FOLDED_WIDTH)
    runs["unfold"] = lambda: folding.unfold(rows)
    seconds = in_turns(runs, seconds=12)
    report(
        "Dequantization of 8 Mi values",
        [
            {
                "type": name,
                "GB/s of float32": VALUES * 4 / one / 1e9,
                "× a copy": one / seconds["copy"],
            }
            for name, one in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()

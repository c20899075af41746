"""The types of GGUF tensors: ids, elements and bytes of a block.

Ids and sizes are those of llama.cpp (ggml/include/ggml.h and ggml/src/ggml-common.h, release
b11434) and, from 142, of PrismML's fork. Ids that llama.cpp has removed are not listed.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor type: how a number of consecutive elements is stored."""

    name: str
    id: int
    """Number in the file."""
    block: int
    """Elements in a block. Rows are whole blocks."""
    size: int
    """Bytes of a block."""

    def bytes_of(self, elements: int) -> int:
        """Return the length in bytes of whole blocks."""
        return elements // self.block * self.size


_TABLE = (
    ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20),
    ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34), ("Q8_1", 9, 32, 36),
    ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176),
    ("Q6_K", 14, 256, 210), ("Q8_K", 15, 256, 292), ("IQ2_XXS", 16, 256, 66),
    ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50),
    ("IQ4_NL", 20, 32, 18), ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82),
    ("IQ4_XS", 23, 256, 136), ("I8", 24, 1, 1), ("I16", 25, 1, 2), ("I32", 26, 1, 4),
    ("I64", 27, 1, 8), ("F64", 28, 1, 8), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2),
    ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36),
    ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18), ("PQ2_0", 142, 128, 34), ("PTQ1_0", 143, 128, 28),
)  # fmt: skip

Q2_0_G128 = TensorType("Q2_0_G128", 42, 128, 34)
"""PrismML's Q2_0 before it was renamed PQ2_0: id 42, but blocks of 128, scale first."""
TQ2_0_G128 = TensorType("TQ2_0_G128", 42, 128, 34)
"""OxiBonsai's ternary type: id 42, blocks of 128, scale last."""

TYPES = {one.id: one for one in (TensorType(*row) for row in _TABLE)}
"""Type by id. Id 42 may also mean Q2_0_G128 or TQ2_0_G128; see gguf_layouts."""
BY_NAME = {one.name: one for one in (*TYPES.values(), Q2_0_G128, TQ2_0_G128)}

FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K": 15, "Q6_K": 18, "BF16": 32, "TQ1_0": 36,
    "TQ2_0": 37, "Q1_0": 40, "Q2_0": 41, "PQ2_0": 141, "PTQ1_0": 143,
}  # fmt: skip
"""general.file_type of a file whose matrices have this type (include/llama.h), a hint only."""

"""Bonsai 2's folded weights: stored rows are not weights, but their Hadamard transforms.

PrismML's fork of llama.cpp computes y = W_f · H (s ∘ x), with signs s for the input width, and H
the normalized Sylvester-Hadamard matrix in blocks along the input (src/llama-model.cpp and
src/llama-graph.cpp of PrismML-Eng/llama.cpp, the keys `prism.hadamard.*`). H is symmetric and its
own inverse, so

    W = (W_f · H) ∘ s        the weights, of which an adapter's delta is a change
    A_f = (A ∘ s) · H        the factor that has the same effect beside W_f: B · A_f is folded B · A

A row of a folded embedding is unfolded by the same formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from bonsai_lora.core.cast import Array, Floats
from bonsai_lora.errors import UnsupportedGgufError
from bonsai_lora.formats.gguf import MAX_TENSORS, Header
from bonsai_lora.formats.gguf_values import ReadAt, ValueType, read_array, read_integers

PREFIX = "prism.hadamard."

_VERSIONS = (1, 2)
_TRANSFORM = "normalized-sylvester-walsh-hadamard"
_AXIS = "input-last-dimension"
_MAX_BLOCK = 1 << 16
_MAX_SIGNS = 1 << 20
"""The widths of Bonsai 2 27B have 28,672 signs in all."""
_KNOWN = frozenset(
    PREFIX + key
    for key in (
        *("version", "block_size", "transform", "axis", "sign_mode", "sign_widths", "sign_values"),
        *("weight_names", "inverse_weight_names", "gdn_v_grouped", "tied_output"),
    )
)
_PIECE_VALUES = 1 << 16
"""Values transformed at a time: 512 KiB of float64."""


@dataclass(frozen=True, eq=False, slots=True)
class Folding:
    """How the weights of a file are folded."""

    block: int
    """Order of the Hadamard matrix, a power of two."""
    signs: Mapping[int, Floats]
    """Input width -> ±1, (width,). Empty if no signs are used."""
    weights: frozenset[str] = frozenset()
    """GGUF names of the folded tensors."""
    is_grouped: bool = False
    """Whether the columns of `ssm_out` are in Hugging Face's order of value heads already, so that
    gguf_names.Change.V_COLUMNS does not apply."""

    def unfold(self, rows: Floats) -> Floats:
        """Return the weights (n, width) of stored rows (n, width), float32.

        Sums are float64, which is exact for ternary and other small codes with float16 scales, and
        are rounded once. No number depends on the rows beside it. Raises UnsupportedGgufError for a
        width that the file does not describe.
        """
        return self._apply(rows, signs_first=False)

    def fold(self, a_matrix: Array) -> Floats:
        """Return A_f (r, width) of an adapter's A (r, width), of any float dtype."""
        return self._apply(a_matrix, signs_first=True)

    def _apply(self, rows: Array, *, signs_first: bool) -> Floats:
        width = rows.shape[1]
        signs = self.signs_of(width)
        out = np.empty(rows.shape, np.float32)
        step = max(1, _PIECE_VALUES // max(1, width))
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(rows), step):
                piece = rows[start : start + step].astype(np.float64)
                if signs_first:
                    piece *= signs
                piece = _transform(piece.reshape(-1, self.block)).reshape(piece.shape)
                if not signs_first:
                    piece *= signs
                out[start : start + step] = piece
        return out

    def signs_of(self, width: int) -> Floats | np.float32:
        """Return the signs of an input width, (width,) or 1.

        Raises UnsupportedGgufError for a width that the file does not describe.
        """
        if width % self.block:
            raise _unsupported(f"rows of {width} values are not whole blocks of {self.block}")
        if not self.signs:
            return np.float32(1)
        if width not in self.signs:
            raise _unsupported(f"{PREFIX}sign_widths has no {width}")
        return self.signs[width]


def _transform(blocks: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return each row (n, b) times the normalized Hadamard matrix of order b.

    The matrix is the Kronecker product of two smaller ones, which are applied to the row as a
    square. Each row is two multiplications of its own, so it does not depend on the others.
    """
    order = blocks.shape[1]
    left = _signs_of_order(1 << (order.bit_length() // 2))
    right = _signs_of_order(order // len(left))
    squares = left @ blocks.reshape(-1, len(left), len(right)) @ right
    squares *= 1 / sqrt(order)
    return squares.reshape(-1, order)


@cache
def _signs_of_order(order: int) -> npt.NDArray[np.float64]:
    """Return the Sylvester-Hadamard matrix (order, order) of ±1."""
    index = np.arange(order)
    signs: npt.NDArray[np.float64] = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) & 1)
    return signs


def read_folding(header: Header, read: ReadAt) -> Folding | None:
    """Return how the weights of a file are folded; None if they are plain.

    Raises UnsupportedGgufError for a version, transform, axis, sign mode or key that is unknown,
    and for values that contradict each other: weights must not be changed without being unfolded.
    """
    keys = [key for key in header.pairs if key.startswith(PREFIX)]
    if not keys:
        return None
    unknown = sorted(set(keys) - _KNOWN)
    if unknown:
        raise _unsupported(f"the key {unknown[0][:100]} is unknown")
    _expect(header, "version", *_VERSIONS)
    _expect(header, "transform", _TRANSFORM)
    _expect(header, "axis", _AXIS)
    block = header.get(PREFIX + "block_size")
    if type(block) is not int or block.bit_count() != 1 or not 1 <= block <= _MAX_BLOCK:
        raise _unsupported(
            f"{PREFIX}block_size is {block!r}, not a power of two up to {_MAX_BLOCK}"
        )
    weights = {*_names(header, read, "weight_names"), *_names(header, read, "inverse_weight_names")}
    grouped = header.get(PREFIX + "gdn_v_grouped")
    if PREFIX + "gdn_v_grouped" in header.pairs and not isinstance(grouped, bool):
        raise _unsupported(f"{PREFIX}gdn_v_grouped is not a boolean")
    folding = Folding(block, _read_signs(header, read), frozenset(weights), grouped is True)
    for name in weights & header.tensors.keys():
        folding.signs_of(header.tensors[name].width)
    return folding


def _expect(header: Header, key: str, *known: int | str) -> None:
    found = header.get(PREFIX + key)
    if found not in known or isinstance(found, bool):  # True is 1
        expected = " or ".join(map(str, known))
        raise _unsupported(f"{PREFIX}{key} is {str(found)[:100]!r}, not {expected}")


def _names(header: Header, read: ReadAt, key: str) -> list[str]:
    value = header.pairs.get(PREFIX + key)
    if value is None:
        return []
    if value.item is not ValueType.STRING or value.count > MAX_TENSORS:
        raise _unsupported(f"{PREFIX}{key} is not an array of up to {MAX_TENSORS} strings")
    return list(read_array(read, value))


def _read_signs(header: Header, read: ReadAt) -> dict[int, Floats]:
    """Return the signs by width, which the file stores one after the other."""
    _expect(header, "sign_mode", "identity", "explicit")
    if header.get(PREFIX + "sign_mode") == "identity":
        if PREFIX + "sign_values" in header.pairs:
            raise _unsupported(f"{PREFIX}sign_mode is 'identity', but there are sign_values")
        return {}
    widths = _numbers(header, read, "sign_widths").tolist()
    values = _numbers(header, read, "sign_values")
    if (
        not widths
        or sum(widths) != len(values)
        or min(widths) < 1
        or len(set(widths)) < len(widths)
    ):
        raise _unsupported(f"{PREFIX}sign_widths do not divide {len(values)} sign_values")
    if not np.isin(values, (1, -1)).all():
        raise _unsupported(f"{PREFIX}sign_values has numbers other than 1 and -1")
    stops = np.cumsum(widths)
    parts = np.split(values.astype(np.float32), stops[:-1])
    return dict(zip(widths, parts, strict=True))


def _numbers(header: Header, read: ReadAt, key: str) -> npt.NDArray[np.integer[Any]]:
    found = read_integers(read, header.pairs.get(PREFIX + key), _MAX_SIGNS)
    if found is None:
        raise _unsupported(f"{PREFIX}{key} is not an array of up to {_MAX_SIGNS} integers")
    return found


def _unsupported(reason: str) -> UnsupportedGgufError:
    return UnsupportedGgufError(
        f"the weights are folded by a Hadamard transform that cannot be undone: {reason}; use a "
        "file with plain weights"
    )

"""The reference's deterministic start values for A, bit for bit, without a loop over elements.

The reference draws A from a xorshift64 generator (Marsaglia 2003, triple 13, 7, 17) seeded from
the dimensions. One step is linear over GF(2), so 2^k steps are one 64 x 64 bit matrix: lanes are
jumped ahead with such matrices and then stepped together.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_MULTIPLIER = 6364136223846793005
_STEPS_LOG2 = 5  # each lane makes 32 steps: the fastest of 8 to 512 for 2^15 to 2^20 values
_CACHED_VALUES = 1 << 20


def kaiming_uniform(d_in: int, d_out: int, rank: int) -> npt.NDArray[np.float32]:
    """Return A (rank, d_in) float32, read-only, uniform in ±sqrt(2 / d_in).

    Equal in every bit to the reference for the same dimensions; d_out only enters the seed.
    Matrices of up to 2^20 values are cached by their dimensions (16 of them).
    """
    draw = _draw_cached if rank * d_in <= _CACHED_VALUES else _draw
    return draw(d_in, d_out, rank)


def _draw(d_in: int, d_out: int, rank: int) -> npt.NDArray[np.float32]:
    seed = (d_in * _MULTIPLIER + d_out + rank + 1) & _MASK
    values = xorshift64(seed, rank * d_in, np.float32)
    bound = np.sqrt(np.float32(2) / np.float32(d_in)) if d_in else np.float32(0)
    # The reference's order of float32 operations: t = x / 2^64, then t * 2 * bound - bound.
    values *= np.float32(2.0**-63)
    values *= bound
    values -= bound
    values.flags.writeable = False
    return values.reshape(rank, d_in)


_draw_cached = lru_cache(maxsize=16)(_draw)


def xorshift64(seed: int, count: int, dtype: type[np.generic] = np.uint64) -> npt.NDArray[Any]:
    """Return the first `count` states (count,) that follow `seed`, each rounded to `dtype`."""
    steps = 1 << _STEPS_LOG2
    lanes = -(-count // steps)
    state = _lane_starts(seed, lanes)
    out = np.empty((lanes, steps), dtype)
    for step in range(steps):
        _step(state)
        out[:, step] = state
    return out.reshape(-1)[:count]


def _step(state: Words) -> None:
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)


def _lane_starts(seed: int, lanes: int) -> Words:
    """Return the states (lanes,) after 0, 32, 64, … steps, by doubling."""
    starts = np.array([seed], np.uint64)
    power = _STEPS_LOG2
    while len(starts) < lanes:
        jumped = _apply(_jump_table(power), starts)
        starts = np.concatenate([starts, jumped])
        power += 1
    return starts[:lanes].copy()


@lru_cache(maxsize=64)
def _jump_table(power: int) -> Words:
    """Return, for 2^power steps, the image (8, 256) of every byte at every byte position."""
    images = np.uint64(1) << np.arange(64, dtype=np.uint64)  # of each single bit
    if power == 0:
        _step(images)
    else:
        half = _jump_table(power - 1)
        images = _apply(half, _apply(half, images))
    table = np.zeros((8, 256), np.uint64)
    for bit, image in enumerate(images):
        byte, low = divmod(bit, 8)
        table[byte, 1 << low : 2 << low] = table[byte, : 1 << low] ^ image
    table.flags.writeable = False
    return table


def _apply(table: Words, state: Words) -> Words:
    result = np.zeros_like(state)
    for byte in range(8):
        result ^= table[byte][(state >> np.uint64(8 * byte)) & np.uint64(255)]
    return result

"""GGUF files for tests, and slow decoders and encoders of their types, one element at a time.

Written from the descriptions of the types in ggml-common.h, independently of the package.
"""

import itertools
import struct

import ml_dtypes
import numpy as np

from bonsai_lora.formats import gguf, gguf_writer
from bonsai_lora.formats.gguf_types import BY_NAME

F32 = np.float32


def half(raw):
    return F32(np.frombuffer(raw, "<f2")[0])


def q1_0(b):
    d = half(b[:2])
    return [d if b[2 + j // 8] >> j % 8 & 1 else -d for j in range(128)]


def codes_of(raw, d):
    return [F32((byte >> 2 * k & 3) - 1) * d for byte in raw for k in range(4)]


def scale_first(b):
    return codes_of(b[2:], half(b[:2]))


def scale_last(b):
    return codes_of(b[:-2], half(b[-2:]))


def tq2_0(b):
    d = half(b[64:])
    return [
        F32((b[32 * c + m] >> 2 * part & 3) - 1) * d
        for c in range(2)
        for part in range(4)
        for m in range(32)
    ]


def trits(b, spans):
    d = half(b[-2:])
    return [
        F32(((byte * 3**n % 256) * 3 >> 8) - 1) * d
        for start, stop, digits in spans
        for n in range(digits)
        for byte in b[start:stop]
    ]


def tq1_0(b):
    return trits(b, [(0, 32, 5), (32, 48, 5), (48, 52, 4)])


def ptq1_0(b):
    return trits(b, [(0, 16, 5), (16, 24, 5), (24, 26, 4)])


def q8_0(b):
    return [F32(q) * half(b[:2]) for q in np.frombuffer(b[2:], np.int8)]


def q4_0(b):
    d = half(b[:2])
    return [F32((byte & 15) - 8) * d for byte in b[2:]] + [
        F32((byte >> 4) - 8) * d for byte in b[2:]
    ]


def q4_k(b):
    d, least, s = half(b[:2]), half(b[2:4]), b[4:16]
    values = []
    for j in range(8):
        scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | s[j - 4] >> 6 << 4
        minimum = s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | s[j] >> 6 << 4
        for byte in b[16 + j // 2 * 32 :][:32]:
            code = byte >> 4 if j % 2 else byte & 15
            values.append(d * F32(scale) * F32(code) - least * F32(minimum))
    return values


def q6_k(b):
    low, high, scales, d = b[:128], b[128:192], np.frombuffer(b[192:208], np.int8), half(b[208:])
    values = []
    for h in range(2):
        for k in range(4):
            for m in range(32):
                byte = low[64 * h + 32 * (k % 2) + m]
                nibble = byte >> 4 if k >= 2 else byte & 15
                code = (nibble | (high[32 * h + m] >> 2 * k & 3) << 4) - 32
                values.append(d * F32(scales[8 * h + 2 * k + m // 16]) * F32(code))
    return values


DECODERS = {
    "Q1_0": q1_0, "Q2_0": scale_first, "PQ2_0": scale_first, "Q2_0_G128": scale_first,
    "TQ2_0_G128": scale_last, "TQ2_0": tq2_0, "TQ1_0": tq1_0, "PTQ1_0": ptq1_0, "Q8_0": q8_0,
    "Q4_0": q4_0, "Q4_K": q4_k, "Q6_K": q6_k,
}  # fmt: skip
SCALES = {
    "TQ2_0_G128": [32], "TQ2_0": [64], "TQ1_0": [52], "PTQ1_0": [26], "Q4_K": [0, 2], "Q6_K": [208]
}  # fmt: skip
"""Where the float16 scales of a block are, if not at its start."""


def decode(name, raw):
    """The values of whole blocks, float32."""
    size = BY_NAME[name].size
    with np.errstate(all="ignore"):
        blocks = [DECODERS[name](raw[at : at + size]) for at in range(0, len(raw), size)]
    return np.array([value for block in blocks for value in block], np.float32)


def random_blocks(name, count, rng):
    """Blocks with any codes and scales around 1."""
    kind = BY_NAME[name]
    raw = rng.integers(0, 256, (count, kind.size)).astype(np.uint8)
    for at in SCALES.get(name, [0]):
        scales = rng.standard_normal((count, 1)).astype("<f2")
        raw[:, at : at + 2] = scales.view(np.uint8)
    return raw.tobytes()


def ternary(count, rng, block=128):
    """Float32 values (count,), each group with one scale: 0 or plus or minus it."""
    scale = rng.uniform(0.01, 0.05, (count // block, 1)).astype(np.float16).astype(np.float32)
    codes = rng.choice([-1, 0, 1], (count // block, block), p=[0.3, 0.4, 0.3])
    codes[:, 0] = 1
    return (codes * scale).astype(np.float32).reshape(-1)


def encode(name, values):
    """The bytes of float32 values that the type holds exactly: ternary ones, or plus and minus d."""
    kind = BY_NAME[name]
    if name in ("F32", "F16", "BF16"):
        dtypes = {"F32": "<f4", "F16": "<f2", "BF16": ml_dtypes.bfloat16}
        return values.astype(dtypes[name]).tobytes()
    return b"".join(ENCODERS[name](name, block) for block in values.reshape(-1, kind.block))


def signs(_name, block):
    packed = np.packbits(block >= 0, bitorder="little").tobytes()
    return np.float16(np.abs(block).max()).tobytes() + packed


def ternary_codes(block):
    largest = np.abs(block).max()
    return np.rint(block / largest).astype(int) + 1, np.float16(largest).tobytes()


def pairs(name, block):
    codes, d = ternary_codes(block)
    packed = (codes.reshape(-1, 4) << [0, 2, 4, 6]).sum(1).astype(np.uint8).tobytes()
    return packed + d if name == "TQ2_0_G128" else d + packed


def planes(_name, block):
    codes, d = ternary_codes(block)
    packed = (codes.reshape(2, 4, 32) << np.array([0, 2, 4, 6])[:, None]).sum(1)
    return packed.astype(np.uint8).tobytes() + d


def base_3(name, block):
    codes, d = ternary_codes(block)
    spans = [(32, 5), (16, 5), (4, 4)] if name == "TQ1_0" else [(16, 5), (8, 5), (2, 4)]
    parts, first = [], 0
    for width, digits in spans:
        part = codes[first : first + width * digits].reshape(digits, width)
        number = sum(part[n] * 3 ** (4 - n) for n in range(digits))
        parts.append(((number * 256 + 242) // 243).astype(np.uint8).tobytes())
        first += width * digits
    return b"".join(parts) + d


ENCODERS = {
    "Q1_0": signs, "Q2_0": pairs, "PQ2_0": pairs, "Q2_0_G128": pairs, "TQ2_0_G128": pairs,
    "TQ2_0": planes, "TQ1_0": base_3, "PTQ1_0": base_3,
}  # fmt: skip


def file_of(pairs, tensors):
    """A file; tensors are name -> (type name, shape, bytes)."""
    return gguf_writer.encode(
        pairs, {name: (BY_NAME[kind], shape, raw) for name, (kind, shape, raw) in tensors.items()}
    )


def parts_of(raw, counts, **more):
    """The files of a split model by the ends of their names, with these numbers of tensors.

    As llama.cpp's gguf-split writes them: all keys are in the first one. `more` are keys of it.
    """
    read = gguf.reader_of(raw)
    header = gguf.read_header(read, len(raw))
    carried = {key: gguf_writer.encoded_value(read, one) for key, one in header.pairs.items()}
    names, made = iter(header.tensors), {}
    for number, count in enumerate(counts):
        keys = {
            **({} if number else carried),
            "split.no": np.uint16(number),
            "split.count": np.uint16(len(counts)),
            "split.tensors.count": np.int32(len(header.tensors)),
            **({} if number else more),
        }
        tensors = {name: header.tensors[name] for name in itertools.islice(names, count)}
        made[f"-{number + 1:05}-of-{len(counts):05}.gguf"] = gguf_writer.encode(
            keys,
            {
                name: (one.type, one.shape, bytes(raw[one.start : one.stop]))
                for name, one in tensors.items()
            },
        )
    assert not [*names]
    return made


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw

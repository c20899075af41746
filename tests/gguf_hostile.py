"""Ways to break a GGUF file: each has a name, the bytes, and the reason that must be given."""

import struct

import gguf_files
import numpy as np
from gguf_files import text

PAIRS = {
    "general.architecture": "qwen3",
    "general.alignment": np.uint32(64),
    "qwen3.block_count": np.uint32(2),
    "tokenizer.ggml.tokens": ["a", "bc", ""],
    "tokenizer.ggml.scores": np.array([0.5, -1], np.float32),
}
TENSORS = {
    "token_embd.weight": ("Q1_0", (3, 128), bytes(54)),
    "output_norm.weight": ("F32", (5,), bytes(20)),
    "blk.0.attn_q.weight": ("F16", (2, 4), bytes(16)),
}
VALID = gguf_files.file_of(PAIRS, TENSORS)


def head(pairs=0, tensors=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs)


def pair(key, kind, raw):
    return text(key) + struct.pack("<I", kind) + raw


def tensor(name, sizes, kind=0, offset=0):
    shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def one(*tensors, data=4096, pairs=b"", count=0):
    """A file of tensor descriptions (and pairs), with zeros as data."""
    raw = head(count, len(tensors)) + pairs + b"".join(tensors)
    return raw + bytes(-len(raw) % 32 + data)


def replaced(old, new):
    assert VALID.count(old) == 1
    return VALID.replace(old, new)


def alignment(kind, raw):
    return one(tensor("a", [1]), pairs=pair("general.alignment", kind, raw), count=1)


U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack

CASES = {
    "empty": (b"", "starts with b'', not b'GGUF'"),
    "a different format": (b"PK\3\4" + VALID[4:], "starts with b'PK"),
    "version 1": (head(version=1), "version 1 of the format"),
    "version 4": (head(version=4), "version 4 of the format"),
    "version 0": (head(version=0), "big-endian"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "only a magic": (b"GGUF", "4 more bytes are needed"),
    "more tensors than bytes": (head(tensors=1000), "announces 1000 tensors, but only 0 bytes"),
    "more pairs than bytes": (head(pairs=1000), "announces 1000 key-value pairs, but only 0 bytes"),
    "2^63 tensors": (head(tensors=2**63), "announces 9223372036854775808 tensors"),
    "2^64 - 1 pairs": (head(pairs=2**64 - 1), "announces 18446744073709551615 key-value pairs"),
    "too many tensors": (
        head(tensors=70_000) + bytes(70_000 * 24),
        "announces 70000 tensors, more than the 65536",
    ),
    "an empty key": (head(1) + pair("", 4, U32(1)) + bytes(9), "key 0 is empty"),
    "a key that is not UTF-8": (head(1) + pair(b"\xff", 4, U32(1)), "is not UTF-8"),
    "a key that is too long": (head(1) + U64(2**40) + bytes(99), "1099511627776 more bytes"),
    "a key of 2^64 - 1 bytes": (head(1) + U64(2**64 - 1) + bytes(99), "more bytes are needed"),
    "two equal keys": (head(2) + pair("k", 4, U32(1)) * 2, "'k' occurs twice"),
    "an unknown value type": (head(1) + pair("k", 13, U32(1)), "unknown value type 13"),
    "an unknown element type": (
        head(1) + pair("k", 9, U32(99) + U64(0)),
        "unknown value type 99",
    ),
    "an array of arrays": (head(1) + pair("k", 9, U32(9) + U64(0)), "array of arrays"),
    "an array longer than the file": (
        head(1) + pair("k", 9, U32(10) + U64(2**61)),
        "18446744073709551616 more bytes",
    ),
    "strings beyond the file": (
        head(1) + pair("k", 9, U32(8) + U64(3)) + text("a") + U64(2**50) + bytes(99),
        "more bytes are needed",
    ),
    "more strings than bytes": (
        head(1) + pair("k", 9, U32(8) + U64(2**30)) + bytes(99),
        "8589934592 more bytes",
    ),
    "a string beyond the file": (head(1) + pair("k", 8, U64(2**62)), "more bytes are needed"),
    "alignment 0": (alignment(4, U32(0)), "general.alignment is 0, not a power of two"),
    "alignment 48": (alignment(4, U32(48)), "general.alignment is 48"),
    "alignment as UINT64": (alignment(10, U64(32)), "of type UINT64, not UINT32"),
    "alignment as an array": (alignment(9, U32(4) + U64(1) + U32(32)), "of type ARRAY"),
    "alignment beyond the file": (alignment(4, U32(2**31)), "its data starts at 2147483648"),
    "a tensor name of 64 bytes": (one(tensor("n" * 64, [1])), "longer than 63 bytes"),
    "a tensor name that is not UTF-8": (one(tensor(b"\xc0", [1])), "is not UTF-8"),
    "two tensors of one name": (
        one(tensor("a", [1]), tensor("a", [1], offset=32)),
        "the tensor 'a' occurs twice",
    ),
    "5 dimensions": (one(tensor("a", [1] * 5)), "has 5 dimensions"),
    "2^32 - 1 dimensions": (
        head(tensors=1) + text("a") + U32(2**32 - 1) + bytes(99),
        "has 4294967295 dimensions",
    ),
    "a negative dimension": (one(tensor("a", [2**64 - 1])), "too large"),
    "too many elements": (one(tensor("a", [2**32, 2**32])), "too large"),
    "too many elements, and none": (one(tensor("a", [2**32, 2**32, 0])), "too large"),
    "a removed type": (one(tensor("a", [32], 4)), "unknown type 4"),
    "a type of a fork": (one(tensor("a", [32], 43)), "unknown type 43"),
    "a negative type": (one(tensor("a", [32], 2**32 - 1)), "unknown type 4294967295"),
    "rows that are not whole blocks": (
        one(tensor("a", [192], 41)),
        "rows of 192 elements, not a multiple of the 128",
    ),
    "an offset that overlaps": (
        one(tensor("a", [9]), tensor("b", [1], offset=32)),
        "'b' starts at 32, not 64: it overlaps",
    ),
    "an offset with a gap": (
        one(tensor("a", [8]), tensor("b", [1], offset=64)),
        "'b' starts at 64, not 32: it leaves a gap",
    ),
    "an offset that is not aligned": (
        one(tensor("a", [1]), tensor("b", [1], offset=4)),
        "'b' starts at 4, not 32",
    ),
    "a first offset": (one(tensor("a", [1], offset=32)), "'a' starts at 32, not 0"),
    "an offset beyond the file": (
        one(tensor("a", [1]), tensor("b", [1], offset=2**64 - 32)),
        "leaves a gap",
    ),
    "data beyond the file": (one(tensor("a", [1025])), "ends 4100 bytes into the data"),
    "blocks that fit no layout": (
        one(tensor("a", [128], 42), tensor("b", [1], offset=128)),
        "'b' starts at 128, not 64",
    ),
}

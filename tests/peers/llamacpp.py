"""llama.cpp (the package xllamacpp) by its C interface, release b11434 and later.

Parameter structures are longer in each release; the offsets of what is set here have not changed.
"""

import ctypes
import functools
from pathlib import Path

import numpy as np

N_CTX, N_THREADS, FLASH_ATTENTION, TYPE_K = 0, 28, 52, 104
"""Offsets in llama_context_params."""


class Parameters(ctypes.Structure):
    """Passed by value in memory, so a longer structure does no harm."""

    _fields_ = (("raw", ctypes.c_uint8 * 512),)

    def put(self, offset, *numbers):
        raw = np.array(numbers, np.int32).tobytes()
        ctypes.memmove(ctypes.addressof(self) + offset, raw, len(raw))


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", ctypes.c_int32),
        ("tokens", ctypes.POINTER(ctypes.c_int32)),
        ("embeddings", ctypes.c_void_p),
        ("positions", ctypes.POINTER(ctypes.c_int32)),
        ("sequence_counts", ctypes.POINTER(ctypes.c_int32)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


@functools.cache
def library():
    """The C functions; raises ImportError without the package."""
    import xllamacpp

    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    pointer = ctypes.c_void_p
    signatures = {
        "llama_model_default_params": (Parameters, []),
        "llama_context_default_params": (Parameters, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, Parameters]),
        "llama_init_from_model": (pointer, [pointer, Parameters]),
        "llama_batch_init": (Batch, [ctypes.c_int32] * 3),
        "llama_decode": (ctypes.c_int32, [pointer, Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (ctypes.c_int32, [pointer]),
        "llama_batch_free": (None, [Batch]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_silent, None)
    found.llama_backend_init()
    return found


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(_level, _text, _data):
    """Take a line of the log, and drop it."""


def logits_of(path, tokens):
    """The logits (n, vocabulary) of a model file: all sums float32, no flash attention."""
    llama = library()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    options = llama.llama_context_default_params()
    options.put(N_CTX, 64, 64, 64)
    options.put(N_THREADS, 1, 1)
    options.put(FLASH_ATTENTION, 0)
    options.put(TYPE_K, 0, 0)
    context = llama.llama_init_from_model(model, options)
    assert context
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.count = len(tokens)
    for place, token in enumerate(tokens):
        batch.tokens[place], batch.positions[place] = int(token), place
        batch.sequence_counts[place], batch.wanted[place] = 1, 1
        batch.sequences[place][0] = 0
    assert llama.llama_decode(context, batch) == 0
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    shape = (len(tokens), width)
    found = np.ctypeslib.as_array(llama.llama_get_logits(context), shape).copy()
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return found

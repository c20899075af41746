"""llama.cpp (the package xllamacpp) by its C interface, release b11434 and later.

Parameter structures are longer in each release, so they are passed larger than needed; the offsets of
what is set here have not changed. As a program: llamacpp.py MODEL TOKENS.npy OUT.npy [LORA...]
"""

import ctypes
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np

N_CTX, N_THREADS, FLASH_ATTENTION, TYPE_K = 0, 28, 52, 104
"""Offsets in llama_context_params."""
P, INT = ctypes.c_void_p, ctypes.c_int32


class Parameters(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_uint8 * 512),)

    def put(self, offset, *numbers):
        (INT * len(numbers)).from_buffer(self, offset)[:] = numbers


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", INT),
        ("tokens", ctypes.POINTER(INT)),
        ("embeddings", P),
        ("positions", ctypes.POINTER(INT)),
        ("sequence_counts", ctypes.POINTER(INT)),
        ("sequences", ctypes.POINTER(ctypes.POINTER(INT))),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


@functools.cache
def library():
    """The C functions; raises ImportError without the package."""
    import xllamacpp

    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    floats = ctypes.POINTER(ctypes.c_float)
    for name, result, *arguments in (
        ("llama_model_default_params", Parameters),
        ("llama_context_default_params", Parameters),
        ("llama_model_load_from_file", P, ctypes.c_char_p, Parameters),
        ("llama_init_from_model", P, P, Parameters),
        ("llama_adapter_lora_init", P, P, ctypes.c_char_p),
        ("llama_set_adapters_lora", INT, P, ctypes.POINTER(P), ctypes.c_size_t, floats),
        ("llama_batch_init", Batch, INT, INT, INT),
        ("llama_decode", INT, P, Batch),
        ("llama_get_logits", floats, P),
        ("llama_model_get_vocab", P, P),
        ("llama_vocab_n_tokens", INT, P),
        ("llama_batch_free", None, Batch),
        ("llama_free", None, P),
        ("llama_model_free", None, P),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(_silent, None)
    found.llama_backend_init()
    return found


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, P)
def _silent(_level, _text, _data):
    """Take a line of the log, and drop it."""


def logits_of(path, tokens, *loras):
    """The logits (n, vocabulary) of a model file: all sums float32, no flash attention.

    An adapter may make llama.cpp abort the process; see `logits_apart`.
    """
    llama = library()
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    adapters = [llama.llama_adapter_lora_init(model, str(one).encode()) for one in loras]
    assert all(adapters), "an adapter is refused"
    options = llama.llama_context_default_params()
    options.put(N_CTX, 64, 64, 64)
    options.put(N_THREADS, 1, 1)
    options.put(FLASH_ATTENTION, 0)
    options.put(TYPE_K, 0, 0)
    context = llama.llama_init_from_model(model, options)
    assert context, "there is no context"
    count = len(adapters)
    ones = (ctypes.c_float * count)(*[1.0] * count)
    assert llama.llama_set_adapters_lora(context, (P * count)(*adapters), count, ones) == 0
    found = _decoded(llama, model, context, tokens)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return found


def _decoded(llama, model, context, tokens):
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
    return found


def logits_apart(path, tokens, folder, *loras):
    """The same from a process of its own, which llama.cpp may abort, within a minute."""
    np.save(folder / "tokens.npy", np.asarray(tokens))
    arguments = [path, folder / "tokens.npy", folder / "logits.npy", *loras]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        timeout=60,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return np.load(folder / "logits.npy")


if __name__ == "__main__":
    np.save(sys.argv[3], logits_of(sys.argv[1], np.load(sys.argv[2]), *sys.argv[4:]))

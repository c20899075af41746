"""Logits of llama.cpp (xllamacpp), as a program: llamacpp_process.py MODEL TOKENS.npy OUT.npy [LORA...]

The structures of llama.h (release b11549) are passed by value and larger than needed; only a few
fields, at their offsets, are set.
"""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np

P, INT = ctypes.c_void_p, ctypes.c_int32


class Parameters(ctypes.Structure):
    _fields_ = (("raw", ctypes.c_uint8 * 512),)

    def set(self, offset, *values):
        (INT * len(values)).from_buffer(self, offset)[:] = values


class Batch(ctypes.Structure):
    _fields_ = (
        ("count", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", P),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library():
    import xllamacpp

    found = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    for name, result, *arguments in (
        ("llama_model_default_params", Parameters),
        ("llama_context_default_params", Parameters),
        ("llama_model_load_from_file", P, ctypes.c_char_p, Parameters),
        ("llama_init_from_model", P, P, Parameters),
        ("llama_adapter_lora_init", P, P, ctypes.c_char_p),
        ("llama_set_adapters_lora", INT, P, ctypes.POINTER(P), ctypes.c_size_t,
         ctypes.POINTER(ctypes.c_float)),
        ("llama_batch_init", Batch, INT, INT, INT),
        ("llama_decode", INT, P, Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), P),
        ("llama_model_get_vocab", P, P),
        ("llama_vocab_n_tokens", INT, P),
    ):  # fmt: skip
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_backend_init()
    return found


def compute(model_path, tokens, lora_paths):
    """Logits (n, vocabulary) of one sequence, in float32 without flash attention."""
    llama = library()
    model = llama.llama_model_load_from_file(
        model_path.encode(), llama.llama_model_default_params()
    )
    assert model, "the model is refused"
    loras = [llama.llama_adapter_lora_init(model, path.encode()) for path in lora_paths]
    assert all(loras), "the adapter is refused"
    parameters = llama.llama_context_default_params()
    parameters.set(0, 64, 64, 64)  # n_ctx, n_batch, n_ubatch
    parameters.set(28, 1, 1)  # n_threads, n_threads_batch
    parameters.set(52, 0)  # flash_attn_type
    parameters.set(104, 0, 0)  # type_k, type_v: F32
    context = llama.llama_init_from_model(model, parameters)
    assert context, "there is no context"
    count = len(loras)
    ones = (ctypes.c_float * count)(*[1.0] * count)
    assert llama.llama_set_adapters_lora(context, (P * count)(*loras), count, ones) == 0
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.count = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    assert llama.llama_decode(context, batch) == 0
    width = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    return np.ctypeslib.as_array(llama.llama_get_logits(context), (len(tokens), width)).copy()


def logits(model_path, tokens, folder, *lora_paths):
    """The same from a process of its own, which llama.cpp may abort, within a minute."""
    np.save(folder / "tokens.npy", np.asarray(tokens))
    arguments = [model_path, folder / "tokens.npy", folder / "logits.npy", *lora_paths]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        timeout=60,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
    return np.load(folder / "logits.npy")


if __name__ == "__main__":
    np.save(sys.argv[3], compute(sys.argv[1], np.load(sys.argv[2]).tolist(), sys.argv[4:]))

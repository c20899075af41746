"""The same upload gets the same answer however busy the machine is."""

import contextlib
import multiprocessing
import os

import numpy as np
from conftest import peft_config, peft_tensors, upload_parts

LAYERS = 30
Q_PROJ = "model.layers.{}.self_attn.q_proj"


def many(rng):
    return {
        key: one
        for layer in range(LAYERS)
        for key, one in peft_tensors(rng, Q_PROJ.format(layer)).items()
    }


CASES = {
    "expressions": {"alpha_pattern": {rf"layers\.{n}\..*q_proj": n for n in range(LAYERS)}},
    "names": {"rank_pattern": {Q_PROJ.format(n): 4 for n in range(LAYERS)}},
    "lookahead": {"alpha_pattern": {"(?=model).*": 2}},
    "repetition": {"alpha_pattern": {"x{5000000}": 2}},
    "no expression": {"rank_pattern": {"(((": 4}},
    "infinity": {},
}


@contextlib.contextmanager
def busy():
    """Keep all cores busy with twice as many processes."""
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=spin, daemon=True) for _ in range(2 * (os.cpu_count() or 1))
    ]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def spin():
    while True:
        pass


def answer(client, config, tensors):
    """The status and body of an upload, without what differs each time."""
    found = upload_parts(client, "s", config, tensors)
    body = found.json()
    for name in ("version", "created_at", "updated_at", "instance", "request_id"):
        body.pop(name, None)
    return found.is_success, body


def test_the_same_upload_ten_times_under_full_load(client, rng):
    tensors = many(rng)
    infinite = {key: np.full_like(one, np.inf) for key, one in tensors.items()}
    uploads = {
        case: (peft_config(**changes), infinite if case == "infinity" else tensors)
        for case, changes in CASES.items()
    }
    quiet = {case: answer(client, *one) for case, one in uploads.items()}
    assert [case for case, (is_success, _) in quiet.items() if is_success] == [
        "expressions",
        "names",
    ]
    with busy():
        for case, one in uploads.items():
            for _ in range(10):
                assert answer(client, *one) == quiet[case], case

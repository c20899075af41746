"""A module of a set as a callable, for arrays; tests/peers has the one for tensors."""

import numpy as np
import pytest
from conftest import TINY, serving

from bonsai_lora import Client, Layer
from bonsai_lora.api.app import create_app
from bonsai_lora.errors import AdapterNotFoundError, DoraNeedsBaseError, ShapeMismatchError
from bonsai_lora.settings import Settings

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def caller(tmp_path_factory):
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("layer") / "store")))
    with serving(app) as url, Client(url) as caller:
        for name in ("plain", "rslora-patterns", "dora"):
            caller.upload_set(name, TINY / name)
        yield caller


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_any_shape_and_dtype(caller, rng, shape, dtype):
    x = rng.standard_normal(shape).astype(dtype)
    added = Layer(caller, "plain", Q_PROJ)(x)
    rows = x.reshape(-1, 64).astype(np.float32)
    expected = caller.apply("plain", Q_PROJ, rows).outputs.reshape(*shape[:-1], 128)
    assert added.dtype == dtype
    assert added.shape == (*shape[:-1], 128)
    assert np.array_equal(added, expected.astype(dtype))


def test_an_array_in_any_layout(caller, rng):
    x = rng.standard_normal((64, 6)).astype(np.float32).T[::2]
    layer = Layer(caller, "plain", Q_PROJ)
    assert np.array_equal(layer(x), layer(np.ascontiguousarray(x)))


def test_options_are_those_of_apply(caller, rng):
    x = rng.standard_normal((2, 64)).astype(np.float32)
    options = {"sets": {"rslora-patterns": 0.25}, "scale": 0.5}
    added = Layer(caller, "plain", Q_PROJ, **options)(x)
    assert np.array_equal(added, caller.apply("plain", Q_PROJ, x, **options).outputs)


def test_dora_needs_the_outputs_of_the_base(caller, rng):
    x = rng.standard_normal((2, 64)).astype(np.float32)
    layer = Layer(caller, "dora", Q_PROJ)
    with pytest.raises(DoraNeedsBaseError):
        layer(x)


def test_refusals_are_those_of_apply(caller):
    with pytest.raises(ShapeMismatchError):
        Layer(caller, "plain", Q_PROJ)(np.ones(3))
    with pytest.raises(AdapterNotFoundError):
        Layer(caller, "plain", "nothing")(np.ones(64))

"""A module of a set as a callable, to add to a linear layer of a model."""

import sys
from typing import Any

import numpy as np

from bonsai_lora.client.answers import Weights
from bonsai_lora.client.blocking import Client
from bonsai_lora.client.tensors import Array
from bonsai_lora.errors import DoraNeedsBaseError


class Layer:
    """Computes what the adapter of one module adds: `layer(x)` is scaling · B·A·x.

    `x` is a NumPy array or a torch tensor, (…, d_in) of any float dtype, on any device; the result
    has its kind, dtype and device, and the shape (…, d_out). Each call is one request, which is
    computed in float32. Gradients do not flow through it.
    """

    def __init__(
        self,
        client: Client,
        set_name: str,
        module: str,
        *,
        sets: Weights | None = None,
        scale: float = 1.0,
        match: str | None = None,
        version: int | None = None,
    ) -> None:
        """Keep the arguments for `Client.apply`; nothing is sent yet."""
        self.module = module
        self._client = client
        self._set = set_name
        self._options: dict[str, Any] = {
            "sets": sets, "scale": scale, "match": match, "version": version,
        }  # fmt: skip
        self._needs_base = False

    def __call__(self, x: Any, base_outputs: Any = None) -> Any:
        """Return what is added for `x`; a DoRA module needs `base_outputs`, W·x without bias.

        Raises the errors of `Client.apply`, and ValueError for a tensor that requires gradients.
        """
        rows = _rows(x)
        base = None if base_outputs is None else _rows(base_outputs)
        added = self._client.apply(
            self._set, self.module, rows, base_outputs=base, **self._options
        ).outputs
        return _like(x, added.reshape(*x.shape[:-1], added.shape[-1]))

    def hook(self, linear: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """Return the output of a torch module with what is added.

        Use: `linear.register_forward_hook(layer.hook)`. The outputs of `linear` itself are sent
        only if the adapter is a DoRA one.
        """
        x = inputs[0]
        if not self._needs_base:
            try:
                return output + self(x)
            except DoraNeedsBaseError:
                self._needs_base = True
        bias = getattr(linear, "bias", None)
        return output + self(x, output if bias is None else output - bias)


def _rows(x: Any) -> Array:
    """Return vectors as rows, (n, d) in float32."""
    if isinstance(x, np.ndarray):
        array = x
    else:
        if x.requires_grad:
            raise ValueError(
                "the input requires gradients, which do not flow through the service; run the "
                "model under torch.no_grad()"
            )
        array = x.to("cpu", sys.modules["torch"].float32).numpy()
    return np.ascontiguousarray(array.reshape(-1, array.shape[-1]), np.float32)


def _like(x: Any, values: Array) -> Any:
    """Return `values` as an array or tensor like `x`."""
    if isinstance(x, np.ndarray):
        return values.astype(x.dtype, copy=False)
    return sys.modules["torch"].from_numpy(values).to(x)

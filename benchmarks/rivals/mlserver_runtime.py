"""MLServer's part: a runtime with the two products, and a route of its own for raw floats.

Its `/v2/models/…/infer` takes JSON only (SeldonIO/MLServer#324), so its fastest binary form is a
custom route.
"""

import numpy as np
from fastapi import Request
from fastapi.responses import Response
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.handlers.custom import CustomHandler, register_custom_handler
from mlserver.types import InferenceRequest, InferenceResponse

WIDTH = 4096


class LoraRuntime(MLModel):
    """Applies one adapter of random matrices."""

    def __init__(self, settings):
        super().__init__(settings)
        # MLServer makes its routes before it loads models.
        self.raw = self._make_raw()
        register_custom_handler(CustomHandler(rest_path=f"/raw/{self.name}"), self.raw)

    async def load(self) -> bool:
        rank = int(self.settings.parameters.extra["rank"])
        rng = np.random.default_rng(0)
        self._a = rng.standard_normal((rank, WIDTH)).astype(np.float32)
        self._b = rng.standard_normal((WIDTH, rank)).astype(np.float32)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0])
        output = NumpyCodec.encode_output("outputs", self._apply(x))
        return InferenceResponse(model_name=self.name, outputs=[output])

    def _apply(self, x):
        return (x @ self._a.T) @ self._b.T

    def _make_raw(self):
        async def raw(request: Request) -> Response:
            x = np.frombuffer(await request.body(), np.float32).reshape(-1, WIDTH)
            return Response(self._apply(x).tobytes(), media_type="application/octet-stream")

        return raw

"""KServe's Python client speaks to us."""

import asyncio

import httpx
import numpy as np
import pytest
from conftest import TINY, read_tensors, upload

Q_PROJ = "model.layers.0.self_attn.q_proj"

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default"),  # what its many imports complain about
]


@pytest.fixture
def kserve():
    import kserve

    return kserve


def test_kserves_client(client, kserve):
    upload(client, "plain", TINY / "plain")
    golden = read_tensors(TINY / "plain" / "golden.safetensors")
    x, delta = golden[f"{Q_PROJ}.x"], golden[f"{Q_PROJ}.delta"].astype(float)
    url = str(client.base_url)

    async def talk():
        config = kserve.RESTConfig(protocol="v2", timeout=30)
        server = kserve.InferenceRESTClient(config)
        try:
            assert await server.is_server_live(url)
            assert await server.is_server_ready(url)
            assert await server.is_model_ready(url, "plain")
            for is_binary in (True, False):
                given = kserve.InferInput(Q_PROJ, list(x.shape), "FP32")
                given.set_data_from_numpy(x, binary_data=is_binary)
                wanted = {"binary_data_output": is_binary}
                asked = kserve.InferRequest("plain", [given], request_id="7", parameters=wanted)
                answer = await server.infer(url, asked, model_name="plain")
                got = answer.outputs[0].as_numpy()
                assert (answer.id, answer.model_name) == ("7", "plain")
                assert np.linalg.norm(got - delta) < 1e-6 * np.linalg.norm(delta)
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                await server.infer(url, asked, model_name="nobody")
        finally:
            await server.close()

    asyncio.run(talk())

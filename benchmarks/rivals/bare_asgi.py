"""The floor: an ASGI application with nothing but the two products, under uvicorn.

Takes float32 rows as a safetensors body and trusts it. Started as `bare_asgi.py PORT RANK`.
"""

import sys

import numpy as np
import uvicorn

WIDTH = 4096


def application(rank: int):
    rng = np.random.default_rng(0)
    a_matrix = rng.standard_normal((rank, WIDTH)).astype(np.float32)
    b_matrix = rng.standard_normal((WIDTH, rank)).astype(np.float32)

    async def app(scope, receive, send):
        if scope["type"] != "http":
            return
        parts = []
        more = True
        while more:
            message = await receive()
            parts.append(message["body"])
            more = message["more_body"]
        body = b"".join(parts) if len(parts) > 1 else parts[0]
        x = np.frombuffer(body, np.float32, offset=8 + int.from_bytes(body[:8], "little"))
        x = x.reshape(-1, WIDTH)
        outputs = (x @ a_matrix.T) @ b_matrix.T
        text = b'{"outputs":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,%d]}}'
        header = text % (*outputs.shape, outputs.nbytes)
        header += b" " * (-len(header) % 8)
        content = len(header).to_bytes(8, "little") + header + outputs.tobytes()
        headers = [
            (b"content-type", b"application/vnd.safetensors"),
            (b"content-length", str(len(content)).encode()),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


if __name__ == "__main__":
    port, rank = map(int, sys.argv[1:])
    uvicorn.run(application(rank), port=port, log_level="warning", access_log=False)

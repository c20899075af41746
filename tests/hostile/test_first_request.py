"""The first request of a worker takes no longer than the others."""

import subprocess
import sys

ANALYZED = """
import asyncio
import httpx
from fastapi import routing
from bonsai_lora.api.app import create_app
from bonsai_lora.settings import Settings

app = create_app(Settings(no_auth=True))
analyzed = []
analyze = routing.get_dependant

def noted(**options):
    analyzed.append(options["path"])
    return analyze(**options)

async def ask():
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for path in ("/healthz", "/v1/sets", "/nowhere/at/all"):
            assert (await client.get(path)).status_code in (200, 404)

routing.get_dependant = noted
asyncio.run(ask())
print(analyzed)
"""


def test_no_function_of_a_route_is_analyzed_for_the_first_request():
    """FastAPI puts it off, and a worker that has just been started stalled meanwhile."""
    done = subprocess.run(
        [sys.executable, "-c", ANALYZED], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split("\n")[-2] == "[]"
